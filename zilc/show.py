"""Reports as text: tables on a terminal, plain columns that grep and cut can read anywhere else."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from zilc.sizes import show_size

#: Wide enough that no line is ever broken where there is no terminal.
WIDE = 1 << 16
#: More levels than this are shown in ranges.
MOST_LEVELS = 64
MOST_SKIPS = 10


class Page:
    """Text on its way to stdout.

    Args:
        file: by default stdout.  On a terminal tables have rules and wrap; elsewhere a row is a line.
    """

    def __init__(self, file: Any = None) -> None:
        self._file = sys.stdout if file is None else file
        self.terminal = bool(self._file.isatty())
        self._buffer = io.StringIO()
        target = self._file if self.terminal else self._buffer
        self._console = Console(
            file=target, width=None if self.terminal else WIDE, markup=False, emoji=False, highlight=False
        )

    def line(self, text: str = "") -> None:
        """One line of text."""
        self._print(text, soft_wrap=True)

    def facts(self, facts: Mapping[str, Any]) -> None:
        """A fact a line, values in one column."""
        self.table("", [], [[key, value] for key, value in facts.items()])

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Rows under a title.  Columns whose name ends in ``#`` hold numbers, set to the right."""
        made = Table(
            box=box.SIMPLE_HEAD if self.terminal and columns else None, show_header=bool(columns),
            show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True,
        )  # fmt: skip
        for name in columns:
            right = name.endswith("#")
            made.add_column(name.rstrip("#"), justify="right" if right else "left", overflow="fold", no_wrap=right)
        for row in rows:
            made.add_row(*map(_cell, row))
        if title:
            self._print(f"\n{title}", style="bold" if self.terminal else None)
        self._print(made)

    def _print(self, what: Any, **how: Any) -> None:
        self._console.print(what, **how)
        if not self.terminal:
            for text in self._buffer.getvalue().splitlines():
                self._file.write(text.rstrip() + "\n")
            self._buffer.seek(0)
            self._buffer.truncate()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return shape(value)
    return "" if value is None else str(value)


def shape(dims: Sequence[Any] | None) -> str:
    """``[N,3,8,8]``; ``?`` for what is not known."""
    return "?" if dims is None else "[" + ",".join("?" if n is None else str(n) for n in dims) + "]"


def document(data: Any) -> str:
    """One JSON document; numbers that JSON has no word for become null."""
    return json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if hasattr(data, "tolist"):  # NumPy's scalars and arrays
        return _plain(data.tolist())
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data if data is None or isinstance(data, (str, int, float, bool)) else str(data)


# --- levelize -------------------------------------------------------------------------------------------------


def levels(page: Page, report: Mapping[str, Any], written: Sequence[str] = ()) -> None:
    """What ``zilc levelize`` prints."""
    page.facts(
        {
            "model": report["model"],
            "opset": report["opset"],
            "trained outputs": ", ".join(report["outputs"]),
            "K": report["levels"],
            "vertices": f"{report['vertices']} active, {report['frozen_vertices']} frozen",
            "edges": report["edges"],
        }
    )
    page.table(
        "identities",
        ["placement", "vertices#", "bytes#"],
        [[name, cost["vertices"], cost["bytes_formula"]] for name, cost in report["identities"].items()],
    )
    page.table(
        "levels",
        ["level", "vertices#", *(f"identities ({name})#" for name in report["identities"])],
        level_rows(report["per_level"]),
    )
    skips = report["skips"]
    if skips:
        page.table(
            f"longest skips ({min(len(skips), MOST_SKIPS)} of {len(skips)})",
            ["from", "to", "operand#", "from level#", "to level#", "identities#"],
            [
                [s["from"], s["to"], s["operand"], s["from_level"], s["to_level"], s["identities"]]
                for s in skips[:MOST_SKIPS]
            ],
        )
    page.table(
        "leaves",
        ["name", "kind", "shape", "level#", "update step#", "trained"],
        [
            [leaf["name"], leaf["kind"], shape(leaf["shape"]), leaf["level"], leaf["update_step"],
             "yes" if leaf["trained"] else "no"]
            for leaf in report["leaves"]
        ],
    )  # fmt: skip
    _left_out(page, report)
    _notes(page, report)
    _written(page, written)


def _written(page: Page, written: Sequence[str]) -> None:
    if written:
        page.table("written", [], [[path] for path in written])


def level_rows(per_level: Sequence[Mapping[str, int]], most: int = MOST_LEVELS) -> list[list[Any]]:
    """A row a level; equal neighbours share one (``3-7``), and where that is not short enough, ranges are summed."""
    keys = [key for key in (per_level[0] if per_level else ()) if key != "level"]
    runs: list[tuple[int, int, tuple[int, ...]]] = []
    for entry in per_level:
        level, counts = entry["level"], tuple(entry[key] for key in keys)
        if runs and runs[-1][2] == counts:
            runs[-1] = (runs[-1][0], level, counts)
        else:
            runs.append((level, level, counts))
    if len(runs) <= most:
        return [
            [str(a), *counts] if a == b else [f"{a}-{b}", *(f"{n} each" if n else 0 for n in counts)]
            for a, b, counts in runs
        ]
    width = -(-len(per_level) // most)
    rows = []
    for start in range(0, len(per_level), width):
        part = per_level[start : start + width]
        sums = [sum(entry[key] for entry in part) for key in keys]
        rows.append([f"{part[0]['level']}-{part[-1]['level']}", *(f"{n} in all" if n else 0 for n in sums)])
    return rows


def _left_out(page: Page, report: Mapping[str, Any]) -> None:
    if report["left_out"]:
        page.table("left out", ["name", "reason"], [[e["name"], e["reason"]] for e in report["left_out"]])


def _notes(page: Page, report: Mapping[str, Any]) -> None:
    if report["notes"]:
        page.table("notes", [], [[note] for note in report["notes"]])


# --- emit-training --------------------------------------------------------------------------------------------


def graph_data(model: Any) -> dict[str, Any]:
    """Nodes, inputs and outputs of a ModelProto, as data."""
    return {
        "opset": next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None),
        "ir_version": model.ir_version,
        "nodes": len(model.graph.node),
        "inputs": [_value_info(i) for i in model.graph.input],
        "outputs": [_value_info(o) for o in model.graph.output],
    }


def _value_info(info: Any) -> dict[str, Any]:
    from onnx import TensorProto

    from zilc.onnx_io import stated_shape

    kind = info.type.tensor_type
    dtype = TensorProto.DataType.Name(kind.elem_type).lower()
    return {"name": info.name, "dtype": dtype, "shape": stated_shape(kind)}


def _counts(row: Mapping[str, int]) -> str:
    return " + ".join(f"{count} × {name}" for name, count in row.items())


def training(page: Page, data: Mapping[str, Any]) -> None:
    """What ``zilc emit-training`` prints."""
    report, signature, graph = data["report"], data["signature"], data["graph"]
    optimizer = report["optimizer"]
    facts = {
        "model": report["model"],
        "algorithm": signature["algorithm"],
        "schedule": signature["schedule"],
        "mode": signature["mode"],
        **({"precision": signature["precision"]} if "precision" in signature else {}),
        "identities": signature["identities"],
        "K": signature["levels"],
        "loss": ", ".join(f"{kind} of {name}" for name, kind in report["losses"].items()),
    }
    taken = report["lowerings"]["taken"]
    if taken:
        kinds = "; ".join(f"{kind}: {_counts(row)}" for kind, row in taken.items())
        facts["lowerings"] = f"{kinds} ({report['lowerings']['costs']} costs)"
    if optimizer and signature["lr"]:
        options = ", ".join(f"{k}={_option(v)}" for k, v in optimizer.items() if k != "name")
        facts["optimizer"] = f"{optimizer['name']} ({options})"
    if "recompute" in signature:
        facts["activations"] = _activations(signature["recompute"])
    page.facts({**facts, "graph": f"{graph['nodes']} nodes, opset {graph['opset']}, IR version {graph['ir_version']}"})
    rows = {entry["name"]: entry for entry in report["trained"]}
    if signature["parameters"]:
        page.table(
            f"trained ({len(signature['parameters'])})",
            ["name", "shape", "level#", "update step#", "outputs"],
            [
                [p["name"], shape(rows[p["name"]]["shape"]), p["level"], p["level"] - 1,
                 " ".join(filter(None, [p["grad"], p["next"], *(s["next"] for s in p["state"])]))]
                for p in signature["parameters"]
            ],
        )  # fmt: skip
    if signature["input_grads"]:
        page.table(
            "gradients of inputs", ["name", "level#", "output"],
            [[e["name"], e["level"], e["grad"]] for e in signature["input_grads"]],
        )  # fmt: skip
    _left_out(page, report)
    _interface(page, signature, graph)
    _notes(page, report)
    page.table("written", [], [[path] for path in data["written"].values() if path])


def _activations(found: Mapping[str, int]) -> str:
    """What recomputation does to the memory, in a line."""
    peak, without, budget = (show_size(found[key]) for key in ("peak", "peak_without", "budget"))
    if not found["nodes"]:
        return f"{peak} at most, within the budget of {budget}; nothing is recomputed"
    again = f"{found['nodes']} nodes recompute {show_size(found['bytes'])}"
    return f"{peak} at most, within the budget of {budget}, {without} without; {again}"


def _option(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _interface(page: Page, signature: Mapping[str, Any], graph: Mapping[str, Any]) -> None:
    """Inputs and outputs; those of parameters and slots, which the table of parameters names, are counted."""
    per_parameter: set[str] = set()
    for p in signature["parameters"]:
        per_parameter.update(filter(None, [p["name"], p["grad"], p["next"]]))
        per_parameter.update(name for s in p["state"] for name in (s["name"], s["next"]))
    slots = sum(len(p["state"]) for p in signature["parameters"])
    for title in ("inputs", "outputs"):
        own = [e for e in graph[title] if e["name"] not in per_parameter]
        counted = len(graph[title]) - len(own)
        beside = f", and {counted} of parameters{' and their slots' if slots else ''}" if counted else ""
        page.table(
            f"{title} ({len(own)}{beside})", ["name", "dtype", "shape"],
            [[e["name"], e["dtype"], shape(e["shape"])] for e in own],
        )  # fmt: skip


# --- train ----------------------------------------------------------------------------------------------------


def epoch(entry: Mapping[str, Any], epochs: int) -> str:
    """``epoch  3/10  loss 0.1234  accuracy 0.9712  val_loss …``: a line of ``zilc train``."""
    width = len(str(epochs))
    figures = [f"{k} {v:.4f}" for k, v in entry.items() if k not in ("epoch", "seconds")]
    return "  ".join([f"epoch {entry['epoch']:{width}}/{epochs}", *figures, f"seconds {entry['seconds']:.2f}"])


def trained(page: Page, history: Sequence[Mapping[str, Any]], written: str) -> None:
    """What ``zilc train`` prints at the end."""
    last = {k: f"{v:.4f}" for k, v in history[-1].items() if k not in ("epoch", "seconds")}
    page.line()
    page.facts({**last, "seconds": f"{sum(e['seconds'] for e in history):.2f}", "written": written})


# --- trace ----------------------------------------------------------------------------------------------------

#: More steps than this are shown in part.
MOST_STEPS = 40


def trace(page: Page, data: Mapping[str, Any], written: Sequence[str]) -> None:
    """What ``zilc trace`` prints."""
    page.facts(
        {
            "model": data["model"],
            "algorithm": data["algorithm"],
            "identities": f"{data['identities']}, {data['identities_inserted']} vertices",
            "K": data["levels"],
            "inference steps": data["steps"],
            "gamma": data["gamma"],
            "ran in": data["executor"],
        }
    )
    rows = data["states"]
    shown = rows
    if len(rows) > MOST_STEPS:
        shown = rows[: MOST_STEPS - 8] + rows[-8:]
    title = "steps" if len(shown) == len(rows) else f"steps ({len(shown)} of {len(rows)})"
    page.table(
        title, ["t#", "energy#", "highest level with an error#", "parameters that learn#"],
        [[s["step"], s["energy"], s["reached"], s["learning"]] for s in shown],
    )  # fmt: skip
    _notes(page, data)
    _written(page, written)


# --- verify, ops ----------------------------------------------------------------------------------------------


def verification(page: Page, data: Mapping[str, Any]) -> None:
    """What ``zilc verify`` prints."""
    ran, name = data["executor"], {"zil": "Z-IL", "il": "IL", "bp": "BP"}[data["algorithm"]]
    page.facts(
        {
            "model": data["model"],
            "algorithm": f"{data['algorithm']}, {data['schedule']}",
            "precision": data["precision"],
            "training graphs ran in": ran["training"],
            "differences ran in": ran["differences"],
            "tolerance": f"{data['tolerance']:g} against central differences in float64",
            "differences of": data["differences_of"],
        }
    )
    page.table(
        "parameters",
        ["name", "level#", f"{name} and BP", "gradient norm#", "directions#", "error#"],
        [
            [p["name"], p["level"], "bits equal" if p["bits_equal"] else f"differ by {_share(p['divergence'])}",
             p["gradient_norm"], p["directions"], p["max_error"]]
            for p in data["parameters"]
        ],
    )  # fmt: skip
    page.line()
    page.line(f"{name} equals BP bit for bit: {'yes' if data['zil_equals_bp'] else 'no'}")
    if not data["zil_equals_bp"]:
        page.line(f"distance of {name}'s update from BP's, relative to BP's: {_share(data['divergence'])}")
    page.line(f"verdict: {'passed' if data['passed'] else 'FAILED'}")


def certificate(page: Page, data: Mapping[str, Any], written: Sequence[str]) -> None:
    """What ``zilc verify --certificate`` prints."""
    mode = data["independent"]
    uncovered = [f"{p}: {mode[p]['reason']}" for p in ("float64", "float32") if not mode[p]["covered"]]
    page.facts(
        {
            "model": data["model"]["name"],
            "SHA-256": data["model"]["sha256"],
            "K": data["structure"]["levels"],
            "identities": ", ".join(f"{k} {c['vertices']}" for k, c in data["structure"]["identities"].items()),
            "independent reverse mode": "; not covered, ".join([mode["library"], *uncovered]),
        }
    )
    verdicts = {True: "passed", False: "FAILED", None: "not made"}
    page.table(
        "checks",
        ["measured#", "bound#", "result", "what"],
        [[c["measured"], c["bound"], verdicts[c["passed"]], c["text"]] for c in data["checks"]],
    )
    if data["settings"]["ablations"]:
        page.table(
            "distance of the update from BP's, relative to BP's",
            ["variant", "float64#", "float32#", "theory"],
            [
                [v["title"], *(_share(v["divergence"][p]["bp"]) for p in ("float64", "float32")),
                 "" if v["claim"] == "none" else f"{len(v['against_theory'])} off" if v["against_theory"] else "holds"]
                for v in data["variants"]
            ],
        )  # fmt: skip
    page.table("written", [], [[path] for path in written])
    page.line()
    page.line(f"verdict: {'passed' if data['passed'] else 'FAILED'}")


def _share(value: float | None) -> str:
    return f"{value:.3g}" if value is not None and math.isfinite(value) else "not finite"


def operators(page: Page, data: Mapping[str, Any]) -> None:
    """What ``zilc ops`` prints."""
    page.table(
        f"operators of ONNX's default domain, opset {data['opset']}",
        ["operator", "gradient", "rule since", "note"],
        [[e["operator"], e["status"], ",".join(map(str, e["since"])), e["note"]] for e in data["operators"]],
    )
    page.table("", [], [[status, count] for status, count in data["counts"].items()])
