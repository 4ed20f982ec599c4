"""The exam's node tests put to other tools that differentiate ONNX graphs, with the same comparison.

Each tool lives in an environment of its own (``make rivals`` builds them) and is asked through a pipe; its gradients
are judged by tools/exam.py against the same differences at the same points as zilc's.

    python tools/rivals.py                       everything; writes docs/rivals.json, which the exam's table reads
    python tools/rivals.py --rival onnx-ad       one tool anew; what the file says of the other stays
    python tools/rivals.py --only Gemm           cases of some operators, on stdout
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "rivals.json"
#: Seconds that a tool may take for one case.
LIMIT = 30.0
#: By name: the folder of its environment, and what is installed there.
RIVALS = {
    "onnx-ad": (".venv-peers", ("onnx-ad", "onnx")),
    "onnxruntime-training": (".venv-ort-training", ("onnxruntime-training", "onnx")),
}


# --- messages: arrays and JSON, since the environments' versions of numpy cannot read each other's pickles --------


MAGIC = b"rivals\n"


def send(stream: Any, facts: dict[str, Any], arrays: dict[str, Any]) -> None:
    """One message: ``facts`` as JSON, ``arrays`` by name (numbers, and lists of names in place of theirs)."""
    names = list(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **{f"a{k}": np.asarray(arrays[name]) for k, name in enumerate(names)})  # type: ignore[arg-type]
    head = json.dumps({**facts, "names": names}).encode()
    body = buffer.getvalue()
    stream.write(MAGIC + struct.pack("<QQ", len(head), len(body)) + head + body)
    stream.flush()


def receive(stream: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What :func:`send` sent.

    Raises:
        EOFError: the other side is gone, or sends something else.
    """
    sizes = stream.read(len(MAGIC) + 16)
    if len(sizes) < len(MAGIC) + 16 or not sizes.startswith(MAGIC):
        raise EOFError
    head, body = struct.unpack("<QQ", sizes[len(MAGIC) :])
    facts = json.loads(stream.read(head))
    with np.load(io.BytesIO(stream.read(body)), allow_pickle=False) as archive:
        arrays = {name: archive[f"a{k}"] for k, name in enumerate(facts.pop("names"))}
    return facts, arrays


# --- inside a tool's environment ------------------------------------------------------------------------------


def serve(rival: str) -> None:
    """Answer requests for gradients until the pipe is closed."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the tool prints, its C++ parts too, must not get between the answers
    ask = {"onnx-ad": _onnx_ad, "onnxruntime-training": _training}[rival]
    while True:
        try:
            facts, arrays = receive(requests)
        except EOFError:
            return
        try:
            made, results = ask(facts, arrays)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            text = " ".join(lines)
            # Its C++ errors begin with a place and a signature.
            text = re.sub(r"^/onnxruntime_src/.* was false\. ", "", text)
            made, results = {"refused": f"{type(error).__name__}: {text}"[-300:]}, {}
        send(answers, made, results)


def _onnx_ad(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its adjoint graph; the seed count is the last axis."""
    import onnx
    import onnx_ad

    model = onnx.load_from_string(arrays["model"].tobytes())
    made = onnx_ad.reverse(model, inputs=facts["inputs"], outputs=facts["outputs"], prefix="adj_", layout="onnx")
    return {}, {"model": np.frombuffer(made.SerializeToString(), np.uint8)}


def _training(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its gradient graph of <cotangents, outputs>, run by itself."""
    import onnx
    import onnxruntime
    from onnxruntime.capi._pybind_state import GradientGraphBuilder

    model = onnx.load_from_string(arrays["model"].tobytes())
    graph, helper = model.graph, onnx.helper
    kinds = {o.name: o.type.tensor_type.elem_type for o in graph.output}
    parts = []
    for name in facts["outputs"]:
        c = arrays[f"c:{name}"].astype(helper.tensor_dtype_to_np_dtype(kinds[name]))
        graph.initializer.append(onnx.numpy_helper.from_array(c, f"rival.c.{name}"))
        graph.node.append(helper.make_node("Mul", [name, f"rival.c.{name}"], [f"rival.p.{name}"]))
        graph.node.append(helper.make_node("ReduceSum", [f"rival.p.{name}"], [f"rival.s.{name}"], keepdims=0))
        graph.node.append(helper.make_node("Cast", [f"rival.s.{name}"], [f"rival.t.{name}"], to=1))
        parts.append(f"rival.t.{name}")
    total = parts[0]
    for k, part in enumerate(parts[1:]):  # it has no gradient of Sum
        graph.node.append(helper.make_node("Add", [total, part], [f"rival.u.{k}"]))
        total = f"rival.u.{k}"
    graph.node.append(helper.make_node("Identity", [total], ["rival.loss"]))
    graph.output.append(helper.make_tensor_value_info("rival.loss", 1, []))
    builder = GradientGraphBuilder(model.SerializeToString(), {"rival.loss"}, set(facts["inputs"]), "rival.loss")
    builder.build()
    made = onnx.load_from_string(builder.get_model())
    present = {n for node in made.graph.node for n in node.output}
    found = [name for name in facts["inputs"] if f"{name}_grad" in present]
    if not found:
        raise RuntimeError("the gradient graph holds none of the gradients")
    inputs = {i.name: i for i in graph.input}
    listed = {o.name for o in made.graph.output}
    for name in found:
        if f"{name}_grad" not in listed:
            out = made.graph.output.add()
            out.CopyFrom(inputs[name])
            out.name = f"{name}_grad"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    types = {i.name: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in graph.input}
    feeds = {i.name: arrays[f"f:{i.name}"].astype(types[i.name]) for i in session.get_inputs() if i.name in types}
    seeds = [i for i in session.get_inputs() if i.name not in types]
    feeds.update({i.name: np.ones([n or 1 for n in i.shape], np.float32) for i in seeds})
    values = session.run([f"{name}_grad" for name in found], feeds)
    return {}, {f"g:{name}": np.asarray(v, np.float64) for name, v in zip(found, values)}  # noqa: B905


# --- the side of the exam -------------------------------------------------------------------------------------


class Rival:
    """A tool behind a pipe, started anew when it dies or takes too long."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.python = ROOT / RIVALS[name][0] / "bin" / "python"
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, facts: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Its answer; a death or a long wait is a refusal."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [str(self.python), __file__, "--serve", self.name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        timer = threading.Timer(LIMIT, self.process.kill)
        timer.start()
        began = time.monotonic()
        try:
            send(self.process.stdin, facts, arrays)
            return receive(self.process.stdout)
        except (EOFError, OSError):
            self.process.kill()
            code = self.process.wait()
            late = time.monotonic() - began >= LIMIT
            return {"refused": f"took more than {LIMIT:.0f} s" if late else f"the process died ({code})"}, {}
        finally:
            timer.cancel()

    def versions(self) -> dict[str, str]:
        code = "import sys; from importlib.metadata import version; print(*[version(p) for p in sys.argv[1:]])"
        packages = RIVALS[self.name][1]
        done = subprocess.run([str(self.python), "-c", code, *packages], capture_output=True, text=True, check=True)
        return dict(zip(packages, done.stdout.split(), strict=True))


def gradients_of(rival: Rival, trial: Any) -> tuple[dict[str, np.ndarray], float]:
    """A tool's gradients by input, and the tolerance that their precision asks for.

    Raises:
        ValueError: it refuses.
    """
    from tools import exam_cases, exam_trial

    inputs = list(trial.differences.slopes)
    cotangents = {f"c:{n}": c for n, c in trial.differences.cotangents.items()}
    facts = {"inputs": inputs, "outputs": list(trial.y)}
    if rival.name == "onnx-ad":
        refusal = ""
        for model in (trial.double, trial.model):
            made, arrays = rival.ask(facts, {"model": np.frombuffer(model.SerializeToString(), np.uint8)})
            if "refused" in made:
                refusal = refusal or made["refused"]
                continue
            import onnx

            adjoint = exam_cases.to_double(onnx.load_from_string(arrays["model"].tobytes()))
            names = {i.name for i in adjoint.graph.input}
            feeds = {k: v for k, v in trial.feeds.items() if k in names}
            feeds.update({f"adj_{n[2:]}": c[..., None] for n, c in cotangents.items() if f"adj_{n[2:]}" in names})
            results = exam_trial.either_run(adjoint)(feeds)
            values = dict(zip([o.name for o in adjoint.graph.output], results, strict=True))
            found = {n: np.asarray(values[f"adj_{n}"], np.float64) for n in inputs if f"adj_{n}" in values}
            return {n: g.reshape(g.shape[:-1]) for n, g in found.items()}, 0.0
        raise ValueError(refusal)
    feeds = {f"f:{k}": v for k, v in trial.feeds.items() if isinstance(v, np.ndarray | np.generic)}
    made, arrays = rival.ask(facts, {"model": _for_training(trial.model), **feeds, **cotangents})
    if "refused" in made:
        raise ValueError(made["refused"])
    return {name[2:]: g for name, g in arrays.items()}, exam_trial.TOLERANCE["float32"]


def _for_training(model: Any) -> np.ndarray:
    """The model at an opset and an IR version that it reads, where the operators allow that."""
    import onnx

    from tools import exam
    from zilc.passes.opset import settle_opset

    own = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=18)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    if own > exam.TRAINING_OPSET:
        try:
            made.CopyFrom(settle_opset(model, exam.TRAINING_OPSET, "the model"))
        except Exception:  # then it must refuse what it does not know
            made.CopyFrom(model)
    made.ir_version = min(made.ir_version, 10)
    return np.frombuffer(made.SerializeToString(), np.uint8)


def _brief(reason: str) -> str:
    """A reason without the names of nodes and tensors: the same for many cases."""
    reason = re.sub(r"\[ONNXRuntimeError\] : \d+ : ", "", reason)
    reason = re.sub(r"for node[: ]+\S+|\(node '[^']*'\)|[Nn]ode name: \S+|node with name '[^']*'", "", reason)
    return re.sub(r"\s+", " ", reason)[:160].strip()


def put(case: Any, operator: str, base: Any, rivals: list[Rival]) -> dict[str, Any] | None:
    """What becomes of one case with every tool; None where the exam leaves it out."""
    from tools import exam_cases, exam_trial

    try:
        if exam_cases.floating_path(case.model):
            return None
        trial = exam_trial.trial_of(case, base)
    except exam_cases.Unexamined:
        return None
    found: dict[str, Any] = {"operator": operator}
    for rival in rivals:
        verdict = exam_trial.Verdict(case.name, operator, "right")
        try:
            gradients, tolerance = gradients_of(rival, trial)
            exam_trial.judge(trial, gradients, verdict, rival.name, tolerance)
        except ValueError as error:
            verdict.status, verdict.reason = "refused", str(error)
        except Exception as error:
            verdict.status, verdict.reason = "wrong", f"{type(error).__name__}: {exam_cases.first_line(error)}"
        found[rival.name] = {"status": verdict.status, "reason": _brief(verdict.reason)}
    return found


_HELD: dict[str, Any] = {}


def _start(wanted: list[str]) -> None:
    """What a process keeps: the cases, and its own instance of each tool."""
    from tools import exam_cases

    warnings.simplefilter("ignore")
    _HELD["cases"] = exam_cases.load_cases()
    _HELD["operators"] = exam_cases.operators_of(_HELD["cases"])
    _HELD["rivals"] = [Rival(name) for name in wanted]


def _one(name: str) -> tuple[str, dict[str, Any] | None]:
    from tools import exam_cases

    cases = _HELD["cases"]
    try:
        base = cases[exam_cases.base_of(name, cases)].model
        return name, put(cases[name], _HELD["operators"][name], base, _HELD["rivals"])
    except Exception as error:  # of the exam itself, not of a tool
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return name, None


def report(cases: dict[str, Any], chosen: list[str], whole: int) -> dict[str, Any]:
    """What docs/rivals.json holds.

    ``cases``: by name the operator, then a number a tool, which says where ``answers`` has its status and reason.
    """
    from tools import exam

    answers = Counter(tuple(c[name].values()) for c in cases.values() for name in chosen)
    order = {answer: k for k, (answer, _) in enumerate(answers.most_common())}
    return {
        "environment": exam.environment(),
        "seconds a case": LIMIT,
        "node tests": whole,
        "tools": {
            name: {
                "versions": Rival(name).versions(),
                "totals": dict(Counter(c[name]["status"] for c in cases.values())),
            }
            for name in chosen
        },
        "columns": ["operator", *chosen],
        "answers": [list(answer) for answer in order],
        "cases": {
            name: [c["operator"], *(order[tuple(c[tool].values())] for tool in chosen)]
            for name, c in sorted(cases.items())
        },
    }


def dumps(document: dict[str, Any]) -> str:
    """One line a case and an answer."""

    def lines(value: Any) -> str:
        if isinstance(value, dict):
            return "{\n" + ",\n".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in value.items()) + "\n}"
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"

    parts = {k: lines(v) if k in ("answers", "cases", "tools") else json.dumps(v) for k, v in document.items()}
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {v}" for k, v in parts.items()) + "\n}\n"


def load(path: Path = TARGET) -> dict[str, Any]:
    """By case: ``operator``, and by tool ``status`` and ``reason``."""
    document = json.loads(path.read_text("utf-8"))
    tools = document["columns"][1:]
    answers = [dict(zip(("status", "reason"), answer, strict=True)) for answer in document["answers"]]
    return {
        name: {"operator": operator, **{tool: answers[k] for tool, k in zip(tools, numbers, strict=True)}}
        for name, (operator, *numbers) in document["cases"].items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", default=[], metavar="OP", help="an operator, or a case")
    parser.add_argument("--rival", action="append", choices=list(RIVALS), help="one tool alone")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--serve", choices=list(RIVALS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    sys.path.insert(0, str(ROOT))
    from tools import exam_cases

    chosen = args.rival or list(RIVALS)
    for name in chosen:
        if not Rival(name).python.is_file():
            print(f"{RIVALS[name][0]} is not there: run 'make rivals'", file=sys.stderr)
            return 1
    operators = exam_cases.operators_of(exam_cases.load_cases())
    names = [n for n, op in operators.items() if not args.only or op in args.only or n in args.only]
    cases: dict[str, Any] = load() if args.rival and not args.only and TARGET.is_file() else {}
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(args.processes, _start, (chosen,)) as pool:
        for k, (name, answer) in enumerate(pool.imap_unordered(_one, names)):
            if answer is not None:
                cases[name] = {**cases.get(name, {}), **answer}
            if k % 50 == 49 or k == len(names) - 1:
                print(f"{k + 1}/{len(names)} {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    tools = [t for t in RIVALS if any(t in c for c in cases.values())]
    cases = {n: c for n, c in cases.items() if all(t in c for t in tools)}
    document = report(cases, tools, len(operators))
    if args.only:
        print(dumps(document), end="")
    else:
        TARGET.write_text(dumps(document), "utf-8")
    for name in tools:
        print(name, document["tools"][name]["versions"], document["tools"][name]["totals"], file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
