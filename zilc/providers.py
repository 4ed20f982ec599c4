"""Which execution provider runs a training graph, found out without a word on stdout or stderr."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from zilc.errors import OptionError, RuntimeMissing

Providers = list[str | tuple[str, dict[str, Any]]]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

#: TF32 keeps 10 bits of a product's 23; PyTorch leaves it off in matrix products as well.  Memory is taken as it is
#: asked for, not twice as much each time.  cuDNN's heuristics find algorithms as good as its search of all does, in
#: half precision better ones, and the same ones each time.
CUDA_OPTIONS = {
    "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC",
}  # fmt: skip

#: Distributions that install the one folder ``onnxruntime``; two of them overwrite each other's files.
DISTRIBUTIONS = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn",
    "onnxruntime-training",
)  # fmt: skip


def installed() -> list[str]:
    """The onnxruntime distributions that are installed."""
    found = []
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.distribution(name)
            found.append(name)
    return found


def clash() -> str:
    """What to do where distributions are installed over each other; empty where they are not."""
    found = installed()
    if len(found) < 2:
        return ""
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found else found[0]
    return (
        f"{' and '.join(found)} are installed over each other: "
        f"'pip uninstall {' '.join(found)}', then 'pip install {keep}'"
    )


def import_onnxruntime() -> Any:
    """The onnxruntime package.

    Raises:
        RuntimeMissing: it is not there, or what is there does not load.
    """
    try:
        import onnxruntime

        onnxruntime.get_available_providers()  # an emptied package imports all the same
        return onnxruntime
    except (ImportError, AttributeError) as error:
        found = installed()
        what = f"onnxruntime does not load ({error})" if found else "onnxruntime is not installed"
        raise RuntimeMissing(what, hint=_sentence(clash()) or "pip install onnxruntime") from error


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def provider_names(providers: Iterable[str | tuple[str, dict[str, Any]]]) -> list[str]:
    """Names of execution providers, with or without options."""
    return [provider if isinstance(provider, str) else provider[0] for provider in providers]


def choose_providers(device: str = "auto") -> tuple[Providers, str]:
    """Execution providers for a session, and one line: which, and why.

    ``auto`` takes CUDA where a session really runs on it.  TensorRT is never taken: it compiles for minutes, and
    a training graph changes its weights.  Where CUDA is taken, onnxruntime's default logger is set to fatal errors.

    Args:
        device: auto, cpu or cuda.

    Raises:
        OptionError: no such device.
        RuntimeMissing: ``cuda`` cannot be had, or onnxruntime does not load.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"no device '{device}'", where="--device", hint="Choose auto, cpu or cuda.")
    onnxruntime = import_onnxruntime()
    if device == "cpu":
        return [CPU], "CPU: asked for"
    reason = why_no_cuda(onnxruntime)
    if not reason:
        # cuDNN's vain attempts are logged as errors, by no session's logger; what goes wrong is raised all the same.
        onnxruntime.set_default_logger_severity(4)
        why = "a session runs on it" if device == "auto" else "asked for"
        return [(CUDA, dict(CUDA_OPTIONS)), CPU], f"CUDA: {why}"
    if device == "cuda":
        hint = _sentence(clash()) or "Install a driver and 'pip install zilc[cuda]', or take --device cpu."
        raise RuntimeMissing(f"CUDA cannot be had: {reason}", where="--device cuda", hint=hint)
    return [CPU], f"CPU: {reason}" + (f"; {clash()}" if clash() else "")


def why_no_cuda(onnxruntime: Any) -> str:
    """Why no session can run on CUDA; empty if one can."""
    if CUDA not in onnxruntime.get_available_providers():
        return f"this onnxruntime ({onnxruntime.__version__}) has no CUDA provider"
    if not has_gpu():
        return "no NVIDIA GPU found"
    return probe_cuda()


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA device and its driver; nothing is initialised."""
    if sys.platform == "win32":
        import ctypes

        try:
            ctypes.CDLL("nvcuda.dll")
        except OSError:
            return False
        return True
    folders = (Path("/proc/driver/nvidia/gpus"), Path("/dev"))
    return any(folders[0].glob("*")) or any(folders[1].glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


@functools.cache
def probe_cuda() -> str:
    """Run one addition on CUDA.  The reason why that fails; empty if it does not."""
    import numpy as np
    import onnx.parser

    onnxruntime = import_onnxruntime()
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> probe (float[4] x) => (float[4] y) { y = Add(x, x) }'
    )
    error = ""
    with _silence() as said:
        try:
            if hasattr(onnxruntime, "preload_dlls"):
                onnxruntime.preload_dlls()  # the CUDA libraries that pip installs lie where no loader looks
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), providers=[CUDA], enable_fallback=0
            )
            if CUDA in session.get_providers():
                session.run(None, {"x": np.ones(4, np.float32)})
                return ""
        except Exception as caught:  # whatever onnxruntime raises, the answer is the same
            error = str(caught)
    return _reason(said() + "\n" + error)


def _reason(text: str) -> str:
    """The library that is not there, or the first line of what was said."""
    library = re.search(r"(lib[\w.+-]+|[\w.+-]+\.dll)[\"']?: cannot open shared object file", text)
    if library:
        return f"{library[1]} is not there"
    missing = re.search(r"depends on \"?([\w.+-]+)\"? which is missing", text)
    if missing:
        return f"{missing[1]} is not there"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"the CUDA provider does not start ({lines[0][:200]})" if lines else "the CUDA provider does not start"


@contextlib.contextmanager
def _silence() -> Iterator[Any]:
    """Catch what Python and native code write to stdout and stderr; yields a function that tells it."""
    printed = io.StringIO()
    caught = ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        try:
            saved = os.dup(2)
        except OSError:  # there is no stderr
            yield printed.getvalue
            return
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield lambda: caught + printed.getvalue()
            finally:
                os.dup2(saved, 2)
                os.close(saved)
                file.seek(0)
                caught = file.read().decode(errors="replace")
