"""From a model and data to a trained model: check, compile, train, write."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zilc import cuda_forms, onnx_io
from zilc.data import DataSource, examples, fed, names_in, specs
from zilc.errors import DataError, FileError, OptionError
from zilc.onnx_io import ModelSource, Source
from zilc.pipeline import emit_training
from zilc.providers import CUDA, choose_providers, provider_names
from zilc.runtime import Progress, Trainer


@dataclass
class Trained:
    """What :func:`train` returns.

    Attributes:
        path: the trained model.
        history: one entry an epoch, see :meth:`zilc.runtime.Trainer.fit`.
        device: which execution provider ran, and why.
        providers: onnxruntime's names of those in use.
        notes: what the user should know, one line each.
        signature: the training graph's interface.
        report: what was trained, what was left out and why, as of :func:`zilc.emit_training`.
    """

    path: Path
    history: list[dict[str, Any]]
    device: str
    providers: list[str]
    notes: list[str]
    signature: dict[str, Any]
    report: dict[str, Any]


def train(
    model: ModelSource | Source,
    data: DataSource,
    *,
    out: str | os.PathLike[str],
    lr: float,
    epochs: int,
    batch_size: int,
    val: DataSource | None = None,
    device: str = "auto",
    seed: int = 0,
    shuffle: bool = True,
    on_start: Callable[[Trainer, str, list[str]], None] | None = None,
    on_batch: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Trained:
    """Train a model on arrays and write it with its new weights; nothing is printed.

    Everything that can be known early is checked first: the place of the result, the numbers, the device, the names
    and shapes of the data.  The result is written at the end, whole or not at all.

    Args:
        data: npz file or mapping: examples along axis 0, arrays by input name and target name.
        out: the trained ONNX model.
        val: held-out data, looked at after each epoch.
        device: auto, cpu or cuda.
        seed: of the order of examples, and of Dropout's masks (``mode="train"``).
        on_start: called with the trainer, the device's line and the notes before the first update.
        on_batch, on_epoch: see :meth:`zilc.runtime.Trainer.fit`.
        options: of :func:`zilc.emit_training`.

    Raises:
        DataError: data that do not fit; a loss or weight that is not finite, or gradients that never were, so that
            every update was skipped (nothing is written then).
        FileError: a file that cannot be read or written.
        ZilcError: see :func:`zilc.emit_training`.
    """
    _check_numbers(lr, epochs, batch_size)
    check_writable(out)
    providers, line = choose_providers(device)
    source = onnx_io.load(model, base_dir=options.pop("base_dir", None))
    _check_inputs(source, [data] if val is None else [data, val])
    on_cuda = CUDA in provider_names(providers)
    step = emit_training(source, **{"target": "cuda" if on_cuda else "cpu", **options})
    expected = fed(step.model.graph, step.signature)
    train_set = examples(expected, data, batch_size)
    val_set = examples(expected, val, batch_size) if val is not None else None
    trainer = Trainer(step, lr=lr, providers=providers, seed=seed)
    opset = next(o.version for o in step.model.opset_import if o.domain in ("", "ai.onnx"))
    report, before = step.report, dict(step.state) if step.signature.get("loss_scale") else None
    del source, step  # each holds the weights that the trainer has copied
    notes = train_set.notes + (val_set.notes if val_set else [])
    if on_cuda and opset > cuda_forms.OPSET:
        notes.append(cuda_forms.newer_opset(opset))
    if on_start is not None:
        on_start(trainer, line, notes)
    history = trainer.fit(
        train_set, epochs=epochs, batch_size=batch_size, val=val_set, seed=seed, shuffle=shuffle,
        class_axis=options.get("class_axis"), on_batch=on_batch, on_epoch=on_epoch,
    )  # fmt: skip
    _check_finite(trainer)
    if before is not None:
        _check_moved(trainer, before)
    trainer.export(out)
    return Trained(Path(out), history, line, trainer.providers, notes, trainer.signature, report)


def _check_numbers(lr: float, epochs: int, batch_size: int) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise OptionError(f"learning rate {lr}, expected a finite number above 0", where="--lr")
    if epochs < 1:
        raise OptionError(f"{epochs} epochs", where="--epochs", hint="Take at least 1.")
    if batch_size < 1:
        raise OptionError(f"{batch_size} examples a batch", where="--batch-size", hint="Take at least 1.")


def check_writable(path: str | os.PathLike[str]) -> None:
    """A file can be written there; nothing is left behind.

    Raises:
        FileError: its folder is missing or not writable, or it is a folder itself.
    """
    target = Path(path)
    if target.is_dir():
        raise FileError("is a folder, expected a file name", where=str(path))
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{target.name}.", dir=target.parent):
            pass
    except OSError as error:
        raise FileError(
            f"cannot be written ({error.strerror or error})",
            where=str(path),
            hint="Check that the folder exists and is writable.",
        ) from error


def _check_inputs(source: Source, files: list[DataSource]) -> None:
    """The model's own inputs are in the data; the target has its name only once the graph is emitted."""
    expected = specs(source.proto.graph)
    for data in files:
        where = "data" if isinstance(data, Mapping) else str(data)
        names = names_in(data)
        if any(name not in names for name in expected):
            # The target is no input of the model yet, but the list should name all that the file needs.
            text = ", ".join(map(str, expected.values()))
            missing = ", ".join(repr(n) for n in expected if n not in names)
            raise DataError(
                f"missing {missing}; it has {', '.join(map(repr, names)) or 'nothing'}",
                where=where,
                hint=f"Expected: {text}, and the target ('target', or 'target.OUTPUT' for each of several outputs).",
            )


def _check_finite(trainer: Trainer) -> None:
    """The last loss was computed before the last update, which may have gone wrong all the same."""
    state = trainer.state
    signature = trainer.signature
    for entry in (*signature["parameters"], *signature["carried"]):
        if not np.isfinite(state[entry["name"]].astype(np.float64, copy=False)).all():
            raise DataError(
                f"'{entry['name']}' is not finite after the last update",
                hint=f"Try a learning rate below {trainer.lr:g}.",
            )


def _check_moved(trainer: Trainer, before: Mapping[str, np.ndarray]) -> None:
    """Where loss scaling skips updates, some update was none that it skipped."""
    scale = trainer.signature["loss_scale"]
    state = trainer.state
    if state[scale["good_steps"]]:
        return
    names = [p["name"] for p in trainer.signature["parameters"]]
    if all(np.array_equal(state[name], before[name]) for name in names):
        raise DataError(
            f"every update was skipped: gradients were not finite, down to a loss scale of {state[scale['scale']]:g}",
            hint="Use --precision bfloat16 or float32, and look for values in the data that are not finite.",
        )
