"""The exam: every node test of ONNX whose model has a floating path, its emitted gradients held against differences.

For each case the gradient of every floating input is emitted through the public path, on the model in float64, and
compared by inner products along random directions with central differences of the original model.  Then the gradient
graph of the model as it is must run in ONNX Runtime's CPU provider wherever that runs the model itself, and agree.

    python tools/exam.py                     the whole exam; writes docs/OPERATORS.md
    python tools/exam.py --only Resize       cases of some operators (repeatable; a name of a case will do, too)
    python tools/exam.py --json              one JSON document on stdout
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import onnx.defs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.exam_cases import base_of, load_cases, operators_of  # noqa: E402
from tools.exam_trial import DIRECTIONS, RUNTIME_TOLERANCE, STEP, TOLERANCE, Verdict, examine  # noqa: E402
from zilc.machine import processor  # noqa: E402

#: Seconds that one case may take.
LIMIT = 60.0
#: The newest opset that onnxruntime-training 1.19.2 takes: tools/rivals.py lowers to it.
TRAINING_OPSET = 21

# --- all cases ------------------------------------------------------------------------------------------------


def _worker(pipe: Any) -> None:
    warnings.simplefilter("ignore")
    cases = load_cases()
    operators = operators_of(cases)
    while True:
        name = pipe.recv()
        if name is None:
            return
        base = cases[base_of(name, cases)].model
        pipe.send(asdict(examine(cases[name], operators[name], base)))


def sit(
    names: Sequence[str], operators: Mapping[str, str], *, processes: int = 2, limit: float = LIMIT,
    progress: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:  # fmt: skip
    """Examine cases in worker processes; one that takes too long, or takes its process with it, is wrong."""
    context = multiprocessing.get_context("spawn")
    todo = list(reversed(names))
    done: dict[str, Verdict] = {}
    at_work: dict[Any, tuple[Any, str, float]] = {}

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        hand_out(ours, process, grace=60.0)

    def hand_out(pipe: Any, process: Any, grace: float = 0.0) -> None:
        if todo:
            name = todo.pop()
            pipe.send(name)
            at_work[pipe] = (process, name, time.monotonic() + limit + grace)
        else:
            pipe.send(None)

    def settle(verdict: Verdict) -> None:
        done[verdict.case] = verdict
        if progress:
            progress(verdict)

    for _ in range(min(processes, len(todo))):
        start()
    while at_work:
        ready: list[Any] = multiprocessing.connection.wait(list(at_work), timeout=1.0)
        for pipe in ready:
            process, name, _ = at_work.pop(pipe)
            try:
                verdict = Verdict(**dict(pipe.recv()))
            except (EOFError, OSError):
                process.join()
                settle(Verdict(name, operators[name], "wrong", f"the process died ({process.exitcode})"))
                start()
                continue
            settle(verdict)
            hand_out(pipe, process)
        for pipe, (process, name, until) in list(at_work.items()):
            if time.monotonic() > until:
                del at_work[pipe]
                process.terminate()
                settle(Verdict(name, operators[name], "wrong", f"took more than {limit:.0f} s", seconds=limit))
                if todo:
                    start()
    return [done[name] for name in names if name in done]


# --- reports --------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One operator's cases."""

    operator: str
    right: int = 0
    examined: int = 0
    unexamined: int = 0
    reasons: Counter = field(default_factory=Counter)
    zero: int = 0


def rows_of(verdicts: Iterable[Verdict]) -> list[Row]:
    rows: dict[str, Row] = {}
    for v in verdicts:
        row = rows.setdefault(v.operator, Row(v.operator))
        if v.status == "unexamined":
            row.unexamined += 1
        else:
            row.examined += 1
            row.right += v.status == "right"
            row.zero += v.status == "right" and v.zero
        if v.status != "right":
            row.reasons[f"{v.status}: {v.reason}"] += 1
    return [rows[k] for k in sorted(rows, key=lambda k: ("." in k, k))]


def no_path(v: Verdict) -> bool:
    """Whether a case stays outside because nothing in it is differentiable."""
    return v.status == "unexamined" and not v.reason.startswith("nothing runs")


def totals(verdicts: Sequence[Verdict]) -> dict[str, int]:
    inside = [v for v in verdicts if not no_path(v)]
    return {
        "node tests": len(verdicts),
        "no floating path": len(verdicts) - len(inside),
        "floating path": len(inside),
        "unexamined": sum(v.status == "unexamined" for v in inside),
        "examined": sum(v.status != "unexamined" for v in inside),
        "right": sum(v.status == "right" for v in inside),
        "refused": sum(v.status == "refused" for v in inside),
        "wrong": sum(v.status == "wrong" for v in inside),
        "run in onnxruntime": sum(v.runtime == "runs" for v in inside),
    }


def environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.machine()} {processor()}"}
    for package in ("zilc", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def print_table(verdicts: Sequence[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="ONNX's node tests", title_justify="left")
    for title, justify in (("operator", "left"), ("right", "right"), ("of", "right"), ("why not the rest", "left")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows_of(verdicts):
        if not row.examined and all(not r.startswith("unexamined: nothing") for r in row.reasons):
            continue
        why = "\n".join(f"{count} × {reason}" for reason, count in row.reasons.most_common())
        style = None if row.right == row.examined else "red"
        table.add_row(row.operator, str(row.right), str(row.examined), why, style=style)
    console.print(table)
    for key, count in totals(verdicts).items():
        console.print(f"{key:<20}{count:>6}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", default=[], metavar="OP", help="an operator, or a case")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for each case")
    parser.add_argument("--failures", action="store_true", help="list the cases that are not right, one a line")
    parser.add_argument("--verdicts", type=Path, help="print and write what an exam gave as JSON, without another one")
    parser.add_argument("--write", type=Path, help="where the table goes (docs/OPERATORS.md after a whole exam)")
    args = parser.parse_args(argv)

    wanted = set(args.only)
    if args.verdicts:
        verdicts = [Verdict(**v) for v in json.loads(args.verdicts.read_text("utf-8"))["cases"]]
        return _report(verdicts, args, None if wanted else ROOT / "docs" / "OPERATORS.md")
    operators = operators_of(load_cases())
    names = [n for n, op in operators.items() if not wanted or op in wanted or n in wanted]
    if not names:
        print(f"no node test of {', '.join(args.only)}", file=sys.stderr)
        return 2
    began, count = time.perf_counter(), 0

    def progress(verdict: Verdict) -> None:
        nonlocal count
        count += 1
        if sys.stderr.isatty() or count % 100 == 0 or count == len(names):
            print(f"\r{count}/{len(names)} {time.perf_counter() - began:.0f} s", end="", file=sys.stderr, flush=True)

    verdicts = sit(names, operators, processes=args.processes, limit=args.limit, progress=progress)
    print(file=sys.stderr)
    return _report(verdicts, args, None if wanted else ROOT / "docs" / "OPERATORS.md")


def _report(verdicts: Sequence[Verdict], args: argparse.Namespace, page: Path | None) -> int:
    """The page and what is printed; the exit status."""
    target = args.write or page
    if target is not None:
        target.parent.mkdir(exist_ok=True)
        target.write_text(markdown(verdicts))
    if args.json:
        document = {"environment": environment(), "totals": totals(verdicts), "cases": [asdict(v) for v in verdicts]}
        print(json.dumps(document, indent=1))
    elif args.failures:
        for v in verdicts:
            if v.status != "right" and not no_path(v):
                print(f"{v.operator}\t{v.case}\t{v.status}\t{v.reason}")
        print(totals(verdicts))
    else:
        print_table(verdicts)
    return 0 if all(v.status == "right" or no_path(v) for v in verdicts) else 1


def rivals_of(path: Path = ROOT / "docs" / "rivals.json") -> tuple[dict[str, str], dict[str, Counter]]:
    """Other tools with their versions, and (operator, status) counts of each, as tools/rivals.py left them.

    Both are empty where the file is not there.
    """
    if not path.is_file():
        return {}, {}
    document = json.loads(path.read_text("utf-8"))
    versions = {tool: f"{tool} {facts['versions'][tool]}" for tool, facts in document["tools"].items()}
    counts: dict[str, Counter] = {tool: Counter() for tool in versions}
    for operator, *answers in document["cases"].values():
        for tool, k in zip(document["columns"][1:], answers, strict=True):
            counts[tool][operator, document["answers"][k][0]] += 1
    return versions, counts


def _rival_cell(count: Counter, operator: str) -> str:
    """Right of all, and how many are wrong: to refuse is no fault."""
    right, refused, wrong = (count[operator, status] for status in ("right", "refused", "wrong"))
    if not right + refused + wrong:
        return ""
    return f"{right} of {right + refused + wrong}" + (f", {wrong} wrong" if wrong else "")


def _rival_lines(versions: Mapping[str, str], counts: Mapping[str, Counter]) -> list[str]:
    """What the page says of the other tools."""
    if not versions:
        return []
    lines = [
        "",
        "**Other tools** (`make rivals`) get the same cases, inputs, directions and tolerances; what computes in",
        f"float32 is allowed {TOLERANCE['float32']:g}. A column says how many gradients are right, how many wrong;",
        "the others are refused, by case and with the reason in [rivals.json](rivals.json). They were made for other",
        "ends: onnx-ad needs axes, indices and sizes as constants, which the node tests give as inputs;",
        "onnxruntime-training has gradients for the operators that PyTorch's exporter emitted, up to opset "
        f"{TRAINING_OPSET}.",
        "",
        "| tool | right | refused | wrong |",
        "| --- | ---: | ---: | ---: |",
    ]
    for tool, name in versions.items():
        total: Counter[str] = Counter()
        for (_, status), n in counts[tool].items():
            total[status] += n
        lines.append(f"| {name} | {total['right']} | {total['refused']} | {total['wrong']} |")
    return lines


def markdown(verdicts: Sequence[Verdict]) -> str:
    """docs/OPERATORS.md."""
    from zilc.coverage import operators
    from zilc.onnx_io import MAX_OPSET

    count = totals(verdicts)
    status = {row["operator"]: row["status"] for row in operators(onnx.defs.onnx_opset_version())["operators"]}
    lines = [
        "# Operators",
        "",
        "`make exam` writes this page: every node test of ONNX whose model has a floating path from an input to an",
        "output. The gradient of every floating input is emitted, computed in float64, and compared by inner products",
        f"along {DIRECTIONS} random directions an input with central differences of the original model.",
        "",
        f"| {' | '.join(count)} |",
        f"|{' ---: |' * len(count)}",
        f"| {' | '.join(map(str, count.values()))} |",
        "",
        "Machine and versions: " + ", ".join(f"{key} {value}" for key, value in environment().items()) + ".",
        "",
        "- **Tolerances**, relative to |gradient| |direction|: "
        + ", ".join(f"{TOLERANCE[k]:g} where the original runs in {k} (steps of {STEP[k]:g})" for k in TOLERANCE) + ".",
        "- **Inputs** are moved by up to 0.02, each entry differently, off kinks and ties; entries that are not",
        "  finite stay as they are. Integers and booleans stay. Directions along which the differences do not settle",
        "  are drawn again.",
        "- **The original** is run by ONNX's reference evaluator (repaired where it is wrong or rounds to float32), or",
        "  by ONNX Runtime; who runs it must first give what ONNX expects of the case.",
        "- **In ONNX Runtime**: wherever its CPU provider runs the original (lowered to opset "
        f"{MAX_OPSET} where it is newer), the",
        "  emitted graph must run in the model's own types, and its gradients agree with those in float64 to "
        + ", ".join(f"{v:g} ({k})" for k, v in RUNTIME_TOLERANCE.items()) + ".",
        "- **zero**: right, and the derivative is zero everywhere: zilc says that none flows, the differences agree.",
        "- Expanded function bodies count for their function. Running statistics of BatchNormalization, regions and",
        "  scales of Resize and the limit of Range carry no gradient by convention.",
    ]
    versions, counts = rivals_of()
    lines += _rival_lines(versions, counts)
    heads = "".join(f" {name} |" for name in versions.values())
    lines += [
        "",
        f"| operator | in zilc | right | of | zero | in ONNX Runtime | no floating path | why not the rest |{heads}",
        f"| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |{' --- |' * len(versions)}",
    ]
    runs = Counter(v.operator for v in verdicts if v.runtime == "runs")
    outside = Counter(v.operator for v in verdicts if no_path(v))
    for row in rows_of(verdicts):
        missing = sum(n for r, n in row.reasons.items() if r.startswith("unexamined: nothing"))
        if not row.examined and not missing:
            continue
        kept = [(r, n) for r, n in row.reasons.most_common() if not r.startswith("unexamined") or "nothing runs" in r]
        why = "; ".join(f"{n} × {_cell(r)}" for r, n in kept)
        lines.append(
            f"| {row.operator} | {status.get(row.operator, 'other domain')} | {row.right} | {row.examined + missing} "
            f"| {row.zero} | {runs[row.operator]} | {outside[row.operator]} | {why} |"
            + "".join(f" {_rival_cell(counts[tool], row.operator)} |" for tool in versions)
        )
    reasons = Counter(v.reason for v in verdicts if no_path(v))
    outside_of = ", ".join(f"{r} {n}" for r, n in reasons.most_common())
    lines += ["", f"Node tests without a floating path: {outside_of}."]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) <= 160 else text[:157] + "..."


if __name__ == "__main__":
    sys.exit(main())
