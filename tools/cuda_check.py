"""zilc's gradient graphs on ONNX Runtime's CUDA provider, held against its CPU provider's results.

Every case of the rules' tests (tests/vjp): the operator, and the cotangents of its operands, in float32.

    python tools/cuda_check.py --processes 12 --json FILE    on a machine with a GPU
    python tools/cuda_check.py --from-json FILE --write      docs/CUDA_CHECK.md of what was measured there
    python tools/cuda_check.py --device cpu                  the CPU provider, optimised, in the place of CUDA
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import random
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.helper
import onnx.parser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.cuda_kernels import rule_cases, rule_model  # noqa: E402
from tools.pages import grid  # noqa: E402
from zilc.errors import ZilcError  # noqa: E402
from zilc.machine import gpu, processor  # noqa: E402
from zilc.providers import CPU, Providers, choose_providers, import_onnxruntime  # noqa: E402

JSON, MARKDOWN = ROOT / "docs" / "cuda_check.json", ROOT / "docs" / "CUDA_CHECK.md"

#: Largest difference of an output, by its dtype, as a share of the largest absolute value that the CPU has in it.
#: Chosen before anything was measured: float32 has 1e-7, sums of the cases' lengths in another order and a GPU's own
#: exp and pow lose two decimals of it, one more is left for what cancels; TF32, which is off, would be 1e-3.  In
#: float64 the same allowance would be 1e-13, but some of the CPU's own formulas there keep fewer digits than that.
#: Other dtypes must be equal.
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
#: Seconds that one case may take, and a process until it takes its first.
LIMIT, START = 60.0, 240.0
#: How many notes of a rule the page shows.
SHOWN = 3

Status = Literal["right", "differs", "no kernel", "fails", "random", "no CPU"]
#: What each status means, for people.
MEANING: dict[Status, str] = {
    "right": "all outputs are the CPU's, within the tolerance",
    "differs": "an output is not the CPU's",
    "no kernel": "no session: neither provider has a kernel for a node",
    "fails": "an error, a crash of the process, or no end",
    "random": "it runs; its outputs are drawn at random, which providers do each in their own way",
    "no CPU": "the CPU provider does not run the graph, so that there is nothing to hold CUDA's outputs against",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        note: of what went wrong, one line.
        difference: the largest of all outputs, relative; None where it cannot be told, or is not finite.
        emitted, own: operators that ran on the CPU provider in the device's session, of zilc's nodes and of the
            case's own; those that compute shapes alone are not among them.
        host: nodes there that compute shapes alone, where they belong.
        cpu_only: whether no node at all ran on the device.
    """

    case: str
    op: str
    opset: int
    symbolic: bool
    status: Status
    note: str = ""
    difference: float | None = None
    emitted: list[str] = dataclasses.field(default_factory=list)
    own: list[str] = dataclasses.field(default_factory=list)
    host: int = 0
    cpu_only: bool = False
    seconds: float = 0.0


Judge = Callable[[Any, bool, Providers], Verdict]


# --- one case ---------------------------------------------------------------------------------------------------


def session_of(model: onnx.ModelProto, providers: Providers, *, plain: bool = False) -> Any:
    """A session on one thread, for every core has a process; without onnxruntime's silent change to the CPU.

    Args:
        plain: without the optimisations that fuse nodes: nearer to what the graph says.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=providers, enable_fallback=0
    )


def operator_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """The case's own node without the cotangents."""
    own = onnx.ModelProto()
    own.CopyFrom(model)
    for kept, values in (
        ([node for node in own.graph.node if node.name == "node"], own.graph.node),
        ([x for x in own.graph.input if x.name.startswith("x")], own.graph.input),
        ([y for y in own.graph.output if y.name.startswith("y")], own.graph.output),
    ):
        copies = [type(value).FromString(value.SerializeToString()) for value in kept]
        del values[:]
        values.extend(copies)
    return own


def feeds_of(case: Any, model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The case's operands in the model's dtypes, and a random cotangent of each of its floating results."""
    kinds = {
        x.name: onnx.helper.tensor_dtype_to_np_dtype(x.type.tensor_type.elem_type) for x in model.graph.input
    }
    feeds = {name: np.asarray(case.inputs[int(name[1:])], kind) for name, kind in kinds.items() if name[0] == "x"}
    seeds = [name for name in kinds if name[0] == "g"]
    if seeds:
        session = session_of(operator_of(model), [CPU], plain=True)
        results = dict(zip([y.name for y in session.get_outputs()], session.run(None, feeds), strict=True))
        rng = np.random.default_rng(0)
        for name in seeds:
            feeds[name] = np.asarray(rng.standard_normal(np.shape(results[f"y{name[1:]}"])), kinds[name])
    return feeds


def run_on(session: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name."""
    return dict(zip([y.name for y in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest absolute value that is expected; infinite where one is not finite.

    Where all that is expected is zero, the difference itself: a share of nothing says nothing.
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if got.dtype.kind in "biu":
        got, expected = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(got[finite] - expected[finite]).max() / (np.abs(expected[finite]).max() or 1.0))


def hold(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference of all outputs, and which are beyond the tolerance."""
    largest, notes = 0.0, []
    for name, right in expected.items():
        found = difference(got[name], right)
        largest = max(largest, found)
        if found > TOLERANCE.get(str(right.dtype), 0.0):
            size = np.abs(right[np.isfinite(right)]).max(initial=0) if right.dtype.kind == "f" else None
            how = f"{found:.1e}" if np.isfinite(found) else "shape, dtype or finiteness"
            notes.append(f"{name} by {how}" + ("" if size is None else f" of {size:.2g}"))
    return largest, ", ".join(notes)


def shape_nodes(graph: onnx.GraphProto, known: Iterable[str] = ()) -> set[str]:
    """Names of the nodes, at any depth, that read no values but constants and shapes.

    Args:
        known: outer tensors that are such.
    """
    fixed = {*known, "", *(t.name for t in graph.initializer)} - {x.name for x in graph.input}
    found = set()
    for node in graph.node:
        inner = [a.g for a in node.attribute if a.HasField("g")]
        if node.op_type in ("Shape", "Size") or (all(x in fixed for x in node.input) and not inner):
            fixed.update(node.output)
            found.add(node.name)
        for sub in inner:
            found |= shape_nodes(sub, fixed)
    return found - {""}


def placed(session: Any, model: onnx.ModelProto) -> tuple[list[str], list[str], int, bool]:
    """zilc's operators and the case's own that the CPU provider runs, its shape nodes, and whether it has all.

    Those of the bodies that onnxruntime writes out for a function, or finds in a subgraph, have no name.  What it made
    itself of several nodes has a name of its own: zilc's, then, and no shape.
    """
    shapes = shape_nodes(model.graph)
    lists: dict[bool, set[str]] = {True: set(), False: set()}
    host, elsewhere = 0, False
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != CPU:
            elsewhere = True
            continue
        for node in part.get_nodes():
            if node.name in shapes:
                host += 1
            else:
                lists[node.name in ("", "node") or node.name.startswith("node/")].add(node.op_type)
    return sorted(lists[False]), sorted(lists[True]), host, not elsewhere


def is_random(case: Any) -> bool:
    """Dropout in training mode is the one operator with a rule that draws."""
    return case.op == "Dropout" and len(case.inputs) > 2 and bool(case.inputs[2])


def first_line(error: BaseException) -> str:
    """An error's first line that says something, without what differs from case to case."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", line)
    # Where in its source, and a signature.
    line = re.sub(r"\S*onnxruntime/\S+:\d+ .*?\)(?: const)?(?: \[with [^\]]*\])? ", "", line)
    line = re.sub(r" ?Name:'[^']*'| with name '[^']*'| hostname=[^;]*;", "", line)
    if failure := re.search(r"CU\w+ failure .*", line):
        node = re.search(r"while running (\w+) node", line)
        line = f"{node[1]}: {failure[0]}" if node else failure[0]
    return line if len(line) <= 300 else f"{line[:140]} … {line[-140:]}"


def examine(case: Any, symbolic: bool, providers: Providers) -> Verdict:
    """Run a case on the CPU and on the device."""
    began = time.perf_counter()

    def verdict(status: Status, note: str = "", **more: Any) -> Verdict:
        seconds = round(time.perf_counter() - began, 3)
        return Verdict(str(case), case.op, case.opset, symbolic, status, note, seconds=seconds, **more)

    try:
        model = rule_model(case, symbolic, "cuda" if providers != [CPU] else "cpu")
    except Exception as error:  # a case that the rules' tests would find
        return verdict("fails", f"no graph: {first_line(error)}")
    try:
        feeds = feeds_of(case, model)
        expected = run_on(session_of(model, [CPU], plain=True), feeds)
    except Exception as error:  # onnxruntime's own exception types are not exported
        return verdict("no CPU", first_line(error))
    try:
        session = session_of(model, providers)
    except Exception as error:
        missing = re.search(r"Could not find an implementation for ([\w.]+\(\d+\))", str(error))
        if missing or "NOT_IMPLEMENTED" in str(error):
            return verdict("no kernel", missing[1] if missing else first_line(error))
        return verdict("fails", first_line(error))
    if not isinstance(providers[0], str) and providers[0][0] not in session.get_providers():
        return verdict("fails", "the session is on the CPU provider alone")
    emitted, own, host, cpu_only = placed(session, model)
    where: dict[str, Any] = {"emitted": emitted, "own": own, "host": host, "cpu_only": cpu_only}
    try:
        got = run_on(session, feeds)
    except Exception as error:
        return verdict("fails", first_line(error), **where)
    if is_random(case):
        return verdict("random", **where)
    largest, note = hold(got, expected)
    finite = float(f"{largest:.3g}") if np.isfinite(largest) else None
    return verdict("differs" if note else "right", note, difference=finite, **where)


# --- all cases --------------------------------------------------------------------------------------------------


def all_cases() -> list[tuple[Any, bool]]:
    """The rules' cases, always in the same order; what the list says on stderr is not said here."""
    with contextlib.redirect_stderr(io.StringIO()):
        return list(rule_cases())


def still_runs(providers: Providers) -> bool:
    """Whether the device takes work: an illegal access to memory ends all of a process's."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> probe (float[4] x) => (float[4] y) { y = Add(x, x) }'
    )
    try:
        got = run_on(session_of(model, providers), {"x": np.ones(4, np.float32)})
    except Exception:  # whatever onnxruntime raises, the answer is the same
        return False
    return bool((got["y"] == 2).all())


def _worker(pipe: Any, device: str, judge: Judge) -> None:
    """Say ``ready``, or why not; then answer each case's number with its verdict.

    An answer is a pair: what was found, and whether the process can go on.
    """
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    try:
        if device == "cuda":
            with contextlib.suppress(ImportError):
                importlib.import_module("torch")  # onnxruntime then finds the CUDA libraries that came with it
        import_onnxruntime().set_default_logger_severity(4)
        providers, _ = choose_providers(device)
        cases = all_cases()
    except Exception as error:
        pipe.send((first_line(error), False))
        return
    pipe.send(("ready", True))
    while (number := pipe.recv()) is not None:
        case, symbolic = cases[number]
        found = judge(case, symbolic, providers)
        good = found.status != "fails" or device != "cuda" or still_runs(providers)
        pipe.send((dataclasses.asdict(found), good))
        if not good:
            # Destructors of a broken context may hang or crash; what there is to say has been said.
            pipe.close()
            os._exit(1)


def check(
    cases: Sequence[tuple[Any, bool]], numbers: Iterable[int], *, device: str = "cuda", processes: int = 8,
    limit: float | None = None, case_limit: float = LIMIT, judge: Judge = examine,
    progress: Callable[[Verdict], None] | None = None,
) -> tuple[list[Verdict], str]:  # fmt: skip
    """Examine cases in worker processes; returns verdicts, and why it stopped before the end, if it did.

    A process that dies is started again after the case that it died at, which fails.

    Args:
        cases: those of :func:`all_cases`.
        numbers: which of them.
        limit: seconds after which what is not done is left.
        case_limit: seconds that one case may take.
        judge: what examines a case.
    """
    context = multiprocessing.get_context("spawn")
    end = time.monotonic() + (float("inf") if limit is None else limit)
    todo = list(numbers)
    random.Random(0).shuffle(todo)  # slow operators beside fast ones, and some of each before a limit
    done: dict[int, Verdict] = {}
    at_work: dict[Any, tuple[Any, int | None, float]] = {}
    stopped = ""

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, device, judge), daemon=True)
        process.start()
        theirs.close()
        at_work[ours] = (process, None, time.monotonic() + START)

    def hand_out(pipe: Any, process: Any) -> None:
        number = todo.pop() if todo else None
        with contextlib.suppress(OSError):  # it died meanwhile: the next look at the pipe finds that
            pipe.send(number)
        if number is not None:
            at_work[pipe] = (process, number, time.monotonic() + case_limit)

    def settle(number: int, found: Verdict) -> None:
        done[number] = found
        if progress:
            progress(found)

    def failed(number: int, note: str, seconds: float = 0.0) -> None:
        case, symbolic = cases[number]
        settle(number, Verdict(str(case), case.op, case.opset, symbolic, "fails", note, seconds=seconds))

    for _ in range(min(processes, len(todo))):
        start()
    while at_work and time.monotonic() < end:
        wait = min(1.0, max(end - time.monotonic(), 0.0))
        ready: list[Any] = multiprocessing.connection.wait(list(at_work), timeout=wait)
        for pipe in ready:
            process, number, _ = at_work.pop(pipe)
            try:
                found, good = pipe.recv()
            except (EOFError, OSError):
                process.join()
                found, good = f"the process died ({process.exitcode})", False
                if number is not None:
                    failed(number, f"crashes: {found}")
            else:
                if number is not None:
                    settle(number, Verdict(**found))
            if good:
                hand_out(pipe, process)
            elif number is None:
                stopped = f"a process does not start: {found}"
            elif todo:
                start()
        for pipe, (process, number, until) in list(at_work.items()):
            if time.monotonic() > until:
                del at_work[pipe]
                process.kill()
                if number is None:
                    stopped = f"a process does not start within {START:.0f} s"
                    continue
                failed(number, f"takes more than {case_limit:.0f} s", case_limit)
                if todo:
                    start()
    left = len(todo) + sum(number is not None for _, number, _ in at_work.values())
    if at_work:
        stopped = f"the limit of {limit:.0f} s"
        for process, _, _ in at_work.values():
            process.kill()
    return [done[number] for number in sorted(done)], stopped if left else ""


# --- what is written --------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, str]:
    """The machine and the versions."""
    found = {"date": date.today().isoformat(), "machine": f"{processor()} ({os.cpu_count()} cores)"}
    if device == "cuda":
        found |= gpu()
    found["Python"] = platform.python_version()
    found["onnxruntime"] = import_onnxruntime().__version__
    for package in ("onnx", "numpy", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def counted(notes: Iterable[str]) -> dict[str, int]:
    """Notes and how often, the most frequent first."""
    return dict(sorted(collections.Counter(notes).items(), key=lambda pair: (-pair[1], pair[0])))


def rule_row(found: Sequence[Verdict]) -> dict[str, Any]:
    """One rule's verdicts: counts, and notes with how often each was given."""
    ran = [v for v in found if v.status in ("right", "differs", "random")]
    differences = [v.difference for v in found if v.status == "right" and v.difference is not None]
    return {
        "cases": len(found),
        **{status: sum(v.status == status for v in found) for status in MEANING},
        "emitted": sum(bool(v.emitted) for v in ran),
        "own": sum(bool(v.own) for v in ran),
        "cpu only": sum(v.cpu_only for v in ran),
        "largest": max(differences, default=None),
        "emitted operators": counted(op for v in ran for op in v.emitted),
        "own operators": counted(op for v in ran for op in v.own),
        "notes": counted(f"{v.status}: {v.note}" for v in found if v.note),
    }


def summary(made: Mapping[str, Any]) -> dict[str, Any]:
    """What the page tells, from what was measured: counts by rule, and each case that is not right."""
    verdicts = [Verdict(**found) for found in made["verdicts"]]
    by_rule: dict[str, list[Verdict]] = {}
    for v in verdicts:
        by_rule.setdefault(v.op, []).append(v)
    bad = [v for v in verdicts if v.status in ("differs", "no kernel", "fails")]
    return {
        "facts": made["facts"],
        "device": made["device"],
        "cases": made["cases"],
        "stopped": made["stopped"],
        "seconds": made["seconds"],
        "all": rule_row(verdicts),
        # An output of the operator itself comes first in a note.
        "own differ": sum(v.status == "differs" and v.note.startswith("y") for v in verdicts),
        "rules": {op: rule_row(by_rule[op]) for op in sorted(by_rule)},
        "wrong": [[v.case, v.opset, "symbolic" if v.symbolic else "static", v.status, v.note] for v in bad],
    }


HEADER = [
    "rule of", "cases", "right", "differ", "no kernel", "fail", "random", "no CPU", "zilc's on CPU", "own on CPU",
    "largest difference",
]  # fmt: skip

READING = """Made by `tools/cuda_check.py`. The gradient graph of every case of the rules' tests (the operator and the
cotangents of its operands, static and symbolic, at the case's opset; float32, except where a subgraph states its
dtypes) ran on ONNX Runtime's {device} provider, TF32 off, and each output is held against the CPU provider's, which ran
the graph without fusing nodes. A difference is the largest of an output, as a share of the largest absolute value that
the CPU has in it; {tolerances} pass, and integers and truth values must be equal."""
PLACES = """*on CPU*: cases of those that ran in which the session gave nodes to the CPU provider that read more than
shapes and constants: nodes that zilc emitted, or the case's own operator. {host}"""

OWN = "In {own} of the {differ} cases that differ, an output of the operator itself does, which zilc did not emit."


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """A rule's row for people."""
    largest = "" if row["largest"] is None else f"{row['largest']:.1e}"
    return [
        name, str(row["cases"]), *(str(row[status] or "") for status in MEANING), str(row["emitted"] or ""),
        str(row["own"] or ""), largest,
    ]  # fmt: skip


def _listed(notes: Mapping[str, int], shown: int | None = None) -> str:
    listed = [f"{count} × {note}" for note, count in notes.items()]
    more = f"; {len(listed) - shown} more" if shown is not None and len(listed) > shown else ""
    return "; ".join(listed[:shown]) + more


def markdown(made: Mapping[str, Any]) -> str:
    """docs/CUDA_CHECK.md, of a summary."""
    whole, rules = made["all"], made["rules"]
    tolerances = " and ".join(f"{limit:.0e} in {kind}" for kind, limit in TOLERANCE.items())
    nowhere = whole["cpu only"]
    host = f"In {nowhere} of them no node at all ran elsewhere." if nowhere else ""
    left = made["cases"] - whole["cases"]
    lines = [
        "# CUDA, run" if made["device"] == "cuda" else "# CPU, run", "",
        textwrap.fill(READING.format(device=made["device"].upper(), tolerances=tolerances), 110), "",
        *([f"Stopped by {made['stopped']}: {left} of {made['cases']} cases were not reached.", ""] if left else []),
        *(f"- **{status}**: {what}." for status, what in MEANING.items()), "",
        textwrap.fill(PLACES.format(host=host), 110), "",
        *([OWN.format(own=made["own differ"], differ=whole["differs"]), ""] if whole["differs"] else []),
        ", ".join(f"{key} {value}" if key != "date" else value for key, value in made["facts"].items()) + ".", "",
        *grid(
            HEADER, [cells("**all**", whole), *(cells(op, row) for op, row in rules.items())],
            "l" + "r" * (len(HEADER) - 1),
        ),
    ]  # fmt: skip
    sections = {
        "## What went otherwise": ("notes", SHOWN),
        "## zilc's operators on the CPU provider": ("emitted operators", None),
        "## Operators of the cases on the CPU provider": ("own operators", None),
    }
    for title, (key, shown) in sections.items():
        rows = [[op, _listed(row[key], shown)] for op, row in rules.items() if row[key]]
        if rows:
            lines += ["", title, "", *grid(["rule of", "cases"], rows)]
    return "\n".join([*lines, ""])


def show(made: Mapping[str, Any], console: Any) -> None:
    """The rules with something to tell, and the sum, as a table."""
    from rich.table import Table

    table = Table(*HEADER)
    for op, row in made["rules"].items():
        if row["right"] < row["cases"] or (row["emitted"] and not row["cpu only"]):
            table.add_row(*cells(op, row))
    table.add_row(*cells("all", made["all"]))
    console.print(table)
    for op, row in made["rules"].items():
        if row["notes"]:
            console.print(f"{op}: {_listed(row['notes'], SHOWN)}", markup=False, soft_wrap=True)
    left = made["cases"] - made["all"]["cases"]
    console.print(
        f"{made['all']['cases']} cases in {made['seconds']:.0f} s"
        + (f", {left} not reached: {made['stopped']}" if left else ""), markup=False,
    )  # fmt: skip


def dump(made: Mapping[str, Any]) -> str:
    """What was measured as JSON, one line a case."""
    head = {key: value for key, value in made.items() if key != "verdicts"}
    lines = ",\n".join(json.dumps(found, separators=(",", ":")) for found in made["verdicts"])
    return json.dumps(head, indent=1)[:-2] + f',\n "verdicts": [\n{lines}\n ]\n}}\n'


def measure(options: argparse.Namespace, console: Any) -> dict[str, Any]:
    """Run the cases.

    Raises:
        ZilcError: none ran.
    """
    began = time.perf_counter()
    cases = all_cases()
    wanted = set(options.only or [])
    numbers = [n for n, (case, _) in enumerate(cases) if not wanted or case.op in wanted]
    if not numbers:
        raise ZilcError(f"no case of {', '.join(sorted(wanted))}", where="--only")
    counts: collections.Counter[str] = collections.Counter()

    def progress(found: Verdict) -> None:
        counts[found.status] += 1
        if counts.total() % 200 == 0:
            told = ", ".join(f"{count} {status}" for status, count in counts.items())
            console.print(f"{time.perf_counter() - began:.0f} s: {counts.total()} of {len(numbers)}: {told}")

    limit = None if options.limit is None else options.limit - (time.perf_counter() - began)
    verdicts, stopped = check(
        cases, numbers, device=options.device, processes=options.processes or (8 if options.device == "cuda" else 2),
        limit=limit, progress=progress,
    )  # fmt: skip
    if stopped and not verdicts:
        raise ZilcError(f"no case ran: {stopped}")
    return {
        "facts": environment(options.device), "device": options.device, "cases": len(numbers), "stopped": stopped,
        "seconds": round(time.perf_counter() - began, 1), "verdicts": [dataclasses.asdict(v) for v in verdicts],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--processes", type=int, help="8 on cuda, 2 on cpu")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="stop, and write what there is")
    parser.add_argument("--only", action="append", metavar="OPERATOR", help="its cases alone (repeatable)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was measured, case by case")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="what was measured before, on another machine")
    parser.add_argument("--write", action="store_true", help="docs/CUDA_CHECK.md and docs/cuda_check.json")
    options = parser.parse_args(arguments)
    said = Console(stderr=True, highlight=False)
    if options.from_json:
        made = json.loads(options.from_json.read_text(encoding="utf-8"))
    else:
        try:
            made = measure(options, said)
        except ZilcError as error:
            said.print(str(error), markup=False)
            return 1
    if options.json:
        options.json.write_text(dump(made), encoding="utf-8")
    results = summary(made)
    console = Console()
    show(results, console if console.is_terminal else Console(width=160))
    if options.write:
        JSON.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        MARKDOWN.write_text(markdown(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
