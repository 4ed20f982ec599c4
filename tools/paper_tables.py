"""The paper's Tables 1, 2 and 3 beside ours: ``python tools/paper_tables.py [--networks mlp3,rnn] [--tables 1,3]``.

Table 1 is the divergence of Z-IL's update from BP's with levelling and without, Table 2 the time of an update by BP, IL
and Z-IL, Table 3 the divergence when one condition of the theorem is left out.  Each network is a row; ``--write`` puts
a row into docs/paper.json as soon as it is measured, beside those measured before, and docs/PAPER.md is made from it.
A run that was cut short goes on with ``--resume``; ``--tables ''`` measures nothing and makes the page anew.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console

import zilc
from zilc import models
from zilc.executors import executor
from zilc.machine import processor

DOCS = Path(__file__).resolve().parent.parent / "docs"

#: What the paper trains; sizes that it leaves open are zilc's.  IL's steps: 20 for its MLP, 100 to 200 for RNN and CNN.
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp2": {"title": "MLP, 2 layers", "batch": 20, "steps": 20},
    "mlp3": {"title": "MLP, 3 layers", "batch": 20, "steps": 20},
    "mlp4": {"title": "MLP, 4 layers", "batch": 20, "steps": 20},
    "residual": {"title": "residual network", "batch": 20, "steps": 20},
    "rnn": {"title": "many-to-one RNN", "batch": 20, "steps": 100},
    "alexnet": {"title": "AlexNet", "batch": 20, "steps": 100},
    "resnet18": {"title": "ResNet18", "batch": 20, "steps": 100},
    "transformer": {"title": "Transformer", "batch": 4, "steps": 100},
}
#: Sizes at which divergence is looked at (every step of the dynamics, in float64 too) and the batch; where absent, the
#: full ones.  AlexNet is whole, 61 million parameters on 224 x 224 images: only its batch is smaller.
DIVERGENCE: dict[str, tuple[dict[str, Any], int]] = {
    "alexnet": ({}, 4),
    "resnet18": ({"image": 33, "width": 8, "classes": 100}, 4),
    "transformer": ({"vocabulary": 500, "length": 12, "d_model": 64, "heads": 4, "d_ff": 128}, 4),
}
#: The paper's Table 2, ms an update on two GTX 1080 Ti: BP, IL, Z-IL.
PAPER_MS = {
    "mlp3": (3.72, 594.25, 3.81), "alexnet": (8.61, 661.53, 8.86), "rnn": (5.64, 420.01, 5.67),
    "resnet18": (12.43, 1452.34, 12.53), "transformer": (20.43, 1842.64, 20.53),
}  # fmt: skip
#: Which of the paper's divergences are zero: all of Z-IL's on levelled graphs, no other but those of level graphs.
UNLEVELLED = {"schedule": "literal", "identities": "none"}
TABLE_1: dict[str, dict[str, Any]] = {
    "Z-IL": {},
    "Z-IL, literal": {"schedule": "literal"},
    "Z-IL without levelling": UNLEVELLED,
}
TABLE_3: dict[str, dict[str, Any]] = {
    "Z-IL": {"schedule": "literal"},
    "gamma = 0.5": {"schedule": "literal", "gamma": 0.5},
    "noise of 0.1 at the start": {"schedule": "literal", "init_noise": 0.1},
    "all updates at the last step": {"schedule": "literal", "update_at": "end"},
    "IL": {"algorithm": "il"},
    "IL, fixed predictions": {"algorithm": "il", "fixed_predictions": True, "gamma": 1.0, "steps": "K"},
}
#: A round of a peer takes about this long, at least one update: short, so that both peers of a round meet the machine
#: at the same speed, and many.
ROUND_MS = 50.0
#: The slow dynamics are timed for about this long, at least one whole update.
SLOW_MS = 2000.0


# --- divergence: Tables 1 and 3 ---------------------------------------------------------------------


class Gradients:
    """One network on one batch: BP's gradients, and how far others are from them."""

    #: (network, dtype, digest of the emitted graph) -> divergence: options that emit the same bytes are run once.
    _known: dict[tuple[str, str, str], float | None] = {}  # noqa: RUF012

    def __init__(self, name: str, dtype: str) -> None:
        sizes, batch = DIVERGENCE.get(name, ({}, NETWORKS[name]["batch"]))
        self.name, self.dtype = name, dtype
        self.model = models.build(name, dtype=dtype, **sizes)
        self.feeds = models.random_feeds(self.model, batch, np.random.default_rng(0), loss="cross-entropy")
        self.size = {**sizes, "batch": batch}
        self.ran = ""

    @cached_property
    def bp(self) -> dict[str, np.ndarray]:
        return self.gradients(self.emit(algorithm="bp"))

    def emit(self, **options: Any) -> zilc.TrainingStep:
        return zilc.emit_training(self.model, loss="cross-entropy", outputs="grad", **options)

    def gradients(self, step: zilc.TrainingStep) -> dict[str, np.ndarray]:
        run = executor(step.model)
        made = run({**self.feeds, **{n: np.asarray(step.state[n]) for n in step.state}})
        self.ran = run.name
        return {p["name"]: made[p["grad"]] for p in step.signature["parameters"]}

    def divergence(self, **options: Any) -> float | None:
        """|a - b| / |b| over all parameters at once; None where an update is not finite."""
        if options.get("steps") == "K":
            options["steps"] = zilc.levelize(self.model, identities="none").report["levels"]
        step = self.emit(**options)
        # The signature in the metadata names the options; what runs is the graph.
        digest = hashlib.sha256(step.model.graph.SerializeToString(deterministic=True)).hexdigest()
        key = (self.name, self.dtype, digest)
        if key not in self._known:
            self._known[key] = self._distance(self.gradients(step))
        return self._known[key]

    def _distance(self, found: dict[str, np.ndarray]) -> float | None:
        with np.errstate(all="ignore"):
            off = sum(float(np.sum((found[n].astype("d") - g.astype("d")) ** 2)) for n, g in self.bp.items())
            whole = sum(float(np.sum(g.astype("d") ** 2)) for g in self.bp.values())
        return float(np.sqrt(off / whole)) if np.isfinite(off) else None


def divergences(name: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every row's divergence on a network, in both precisions."""
    result: dict[str, Any] = {"network": name, "rows": {row: {} for row in rows}, "ran": {}}
    for dtype in ("float64", "float32"):
        gradients = Gradients(name, dtype)
        result["size"] = gradients.size
        for row, options in rows.items():
            with np.errstate(all="ignore"):
                result["rows"][row][dtype] = gradients.divergence(**options)
        result["ran"][dtype] = gradients.ran or executor(gradients.emit().model).name
    report = zilc.levelize(gradients.model, identities="none").report
    result["levels"] = report["levels"]
    result["identities"] = {kind: cost["vertices"] for kind, cost in report["identities"].items()}
    return result


# --- time: Table 2 ----------------------------------------------------------------------------------


class Timed:
    """A training graph under way."""

    def __init__(self, model: Any, feeds: dict[str, np.ndarray], **options: Any) -> None:
        step = zilc.emit_training(model, loss="cross-entropy", **options)
        self.step = step
        self.levels = step.signature["levels"]
        self.trainer, self.feeds = zilc.Trainer(step, lr=0.01), feeds
        self.providers = self.trainer.providers

    def ms(self, updates: int = 1) -> float:
        """Mean time of an update."""
        begun = time.perf_counter()
        for _ in range(updates):
            self.trainer.step(self.feeds)
        return (time.perf_counter() - begun) * 1e3 / updates


def optimised_nodes(model: onnx.ModelProto) -> list[bytes]:
    """What onnxruntime runs after its own optimisation: a digest a node, in order.

    A digest covers the operator, its attributes, and for each operand the digest of what makes it; graph inputs count
    by name, initializers by content.  Equal lists are the same kernels on the same operands in the same order.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        options.log_severity_level = 3
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    known = {i.name: i.name.encode() for i in graph.input}
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        known[tensor.name] = hashlib.sha256(f"{values.dtype}{values.shape}".encode() + values.tobytes()).digest()
    made = []
    for node in graph.node:
        attributes = b"".join(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        text = f"{node.domain}:{node.op_type}:{len(node.output)}".encode()
        operands = b"".join(known.get(name, b"") for name in node.input)
        digest = hashlib.sha256(text + attributes + operands).digest()
        known.update({name: digest + bytes([k]) for k, name in enumerate(node.output)})
        made.append(digest)
    return made


def interleaved(peers: dict[str, Timed], updates: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds an update of each peer, round by round, the order turned about."""
    taken: dict[str, list[float]] = {label: [] for label in peers}
    for peer in peers.values():
        peer.ms(2)
    for count in range(rounds):
        for label, peer in list(peers.items())[:: 1 if count % 2 else -1]:
            taken[label].append(peer.ms(updates))
    return taken


def ratio_of(a: list[float], b: list[float]) -> list[float]:
    """The median of a / b round by round, and its bootstrapped 95 % interval."""
    ratios = np.asarray(a) / np.asarray(b)
    drawn = np.median(np.random.default_rng(0).choice(ratios, (4000, len(ratios))), axis=1)
    return [float(np.median(ratios)), *(float(x) for x in np.percentile(drawn, (2.5, 97.5)))]


def timing(name: str, *, rounds: int, sessions: int, peers: list[str], il_steps: int | None) -> dict[str, Any]:
    """BP and Z-IL in turns, round by round; then the literal schedule and IL, at least one whole update each.

    Both are built anew ``sessions`` times, in turns too: where a session's buffers come to lie in memory makes a few
    per cent for as long as it lives.
    """
    entry = NETWORKS[name]
    batch, steps = entry["batch"], il_steps or entry["steps"]
    model = models.build(name)
    feeds = models.random_feeds(model, batch, np.random.default_rng(0), loss="cross-entropy")
    kinds: dict[str, dict[str, Any]] = {"zil": {}, "bp": {"algorithm": "bp"}}
    taken: dict[str, list[float]] = {label: [] for label in kinds}
    for count in range(sessions):
        order = list(kinds)[:: 1 if count % 2 else -1]
        pair = {label: Timed(model, feeds, **kinds[label]) for label in order}
        if not count:
            updates = max(1, int(ROUND_MS / max(*(min(peer.ms() for _ in range(5)) for peer in pair.values()), 1e-3)))
        part = rounds * (count + 1) // sessions - rounds * count // sessions
        for label, values in interleaved(pair, updates, part).items():
            taken[label] += values
    zil, bp = pair["zil"], pair["bp"]
    del pair
    ours, theirs = (optimised_nodes(peer.step.model) for peer in (zil, bp))
    result = {
        "network": name, "batch": batch, "levels": zil.levels, "providers": zil.providers, "rounds": rounds,
        "sessions": sessions,
        "updates": updates, "nodes": len(ours), "same_nodes": Counter(ours) == Counter(theirs),
        "same_order": ours == theirs, "bp_ms": float(np.median(taken["bp"])), "zil_ms": float(np.median(taken["zil"])),
        "zil_bp": ratio_of(taken["zil"], taken["bp"]),
    }  # fmt: skip
    levels = zil.levels
    del zil
    slow: dict[str, dict[str, Any]] = {
        "literal": {"schedule": "literal", "steps": levels},
        "il": {"algorithm": "il", "steps": steps, "gamma": 0.1},
    }
    for label in peers:
        peer = Timed(model, feeds, **slow[label])
        first = peer.ms()  # allocation and, on a GPU, choice of kernels are part of it
        fitting = int(SLOW_MS / first)
        result[f"{label}_updates"] = max(1, fitting)
        result[f"{label}_steps"] = slow[label]["steps"]
        result[f"{label}_ms"] = peer.ms(fitting) if fitting else first
        # BP at that time, on a machine whose speed drifts.
        beside = float(np.median([bp.ms(updates) for _ in range(5)]))
        result[f"{label}_bp"] = result[f"{label}_ms"] / beside
        del peer
        gc.collect()
    return result


# --- the page ---------------------------------------------------------------------------------------


def shown(value: float | None) -> str:
    """A divergence: 0 is exact."""
    return "not finite" if value is None else "**0**" if value == 0.0 else f"{value:.1e}"


def title(name: str) -> str:
    return str(NETWORKS[name]["title"])


def grid(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:], ""]


def divergence_table(found: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    header = ["network", "size", "K", *(f"{row}, {dtype}" for row in rows for dtype in ("float64", "float32"))]
    lines = []
    for name, entry in found.items():
        size = ", ".join(f"{k} {v}" for k, v in sorted(entry["size"].items()))  # as docs/paper.json holds them
        cells = [
            shown(entry["rows"][row][dtype]) if row in entry["rows"] else ""
            for row in rows for dtype in ("float64", "float32")
        ]  # fmt: skip
        lines.append([title(name), size, str(entry["levels"]), *cells])
    paper = {"Z-IL": "0", "Z-IL, literal": "", "IL": "", "IL, fixed predictions": ""}
    lines.append(["*the paper*", "", "", *(cell for row in rows for cell in (paper.get(row, "not 0"), ""))])
    return grid(header, lines)


def placements(found: dict[str, Any]) -> list[str]:
    kinds = ("edge", "shared", "min", "min-bytes")
    rows = [[title(name), *(str(entry["identities"][kind]) for kind in kinds)] for name, entry in found.items()]
    return grid(["network", *kinds], rows)


def time_table(found: dict[str, Any]) -> list[str]:
    header = [
        "network", "batch", "BP ms", "Z-IL ms", "Z-IL / BP", "95 % interval", "optimised graphs", "literal: steps",
        "ms", "/ BP", "IL: T", "ms", "/ BP", "/ BP / T", "paper: BP", "IL", "Z-IL", "Z-IL / BP", "IL / BP",
    ]  # fmt: skip
    lines = []
    for name, entry in found.items():
        bp, il, zil = PAPER_MS.get(name, (None, None, None))
        paper = [f"{x:g}" if x else "" for x in (bp, il, zil)]
        ratios = [f"{zil / bp:.3f}", f"{il / bp:.0f}"] if bp and il and zil else ["", ""]
        middle, low, high = entry["zil_bp"]
        steps = entry.get("literal_steps", entry["levels"] if "literal_ms" in entry else "")
        per_step = f"{entry['il_bp'] / entry['il_steps']:.2f}" if "il_bp" in entry else ""
        lines.append(
            [
                title(name), str(entry["batch"]), f"{entry['bp_ms']:.3g}", f"{entry['zil_ms']:.3g}", f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}", sameness(entry),
                f"{steps} of {entry['levels']}" if steps else "",
                *(f"{entry[k]:.3g}" if k in entry else "" for k in ("literal_ms", "literal_bp")),
                str(entry.get("il_steps", "")),
                *(f"{entry[k]:.3g}" if k in entry else "" for k in ("il_ms", "il_bp")), per_step, *paper, *ratios,
            ]
        )  # fmt: skip
    return grid(header, lines)


def sameness(entry: dict[str, Any]) -> str:
    """Whether Z-IL's and BP's optimised graphs are one."""
    if "same_nodes" not in entry:
        return ""  # a row of an earlier form of this table
    how = "the same, in the same order" if entry["same_order"] else "the same" if entry["same_nodes"] else "others"
    return f"{entry['nodes']} nodes, {how}"


def ordered(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: rows[name] for name in NETWORKS if name in rows}


def page(data: dict[str, Any]) -> str:
    """docs/PAPER.md."""
    one, two, three = (ordered(data.get(f"table{n}", {})) for n in (1, 2, 3))
    lines = [
        "# The paper's tables",
        "",
        'Tables 1, 2 and 3 of "Reverse Differentiation via Predictive Coding" (Salvatori, Song, Lukasiewicz, Bogacz,',
        "Xu; AAAI 2022) beside zilc's. Made by `make paper`; rows can be measured one by one with",
        "`python tools/paper_tables.py --write --networks NAMES --tables 1,2,3`. Every cell is an emitted ONNX graph",
        "run on random data: a choice of `--algorithm`, `--schedule`, `--identities`, `--gamma`, `--init-noise` and",
        "`--update-at`.",
        "",
        "## Table 1: divergence with and without levelling",
        "",
        "The distance of the update from BP's, relative to BP's, over all parameters at once: ‖a − b‖ / ‖b‖ for one",
        "update, cross-entropy. **0** says that every bit agrees up to the sign of zeros. The paper, in float64 only,",
        "prints 0 for Z-IL and large numbers without levelling; its exponents may have lost their signs, so only zero",
        "or not is compared. MLP and AlexNet are level as they are: there is nothing to leave out.",
        "Convolutions in float64 run in onnx's evaluator, where NumPy's order of sums depends on the layout of an",
        "array in memory: the literal schedule may then differ by less than a unit in the last place. The MLPs, the",
        "residual network, the RNN and AlexNet have their full sizes, AlexNet with a smaller batch; where a column",
        "*size* names more than the batch, the network is a smaller one of the same build.",
        "",
        *divergence_table(one, TABLE_1),
        "Identity vertices by placement (*edge*: a chain an edge, the paper's Algorithm 2; *shared*: a chain a tensor;",
        "*min*, *min-bytes*: the fewest vertices, the fewest bytes):",
        "",
        *placements(one),
        "## Table 2: time of an update",
        "",
        "Milliseconds, the whole step with loss and SGD update through `zilc.Trainer`. Z-IL and BP went in turns in",
        "one run, the order turned about from round to round; given is the median of the ratios round by round with a",
        "bootstrapped 95 % interval: where it holds 1, there is no difference. *optimised graphs* compares what",
        "onnxruntime runs after its own optimisation, node by node with attributes and operands: where both are the",
        "same in the same order, the ratio is 1 but for the noise of the clock. *literal* is Z-IL's dynamics as they",
        "are written: all vertices in every step, and one round more; where it says so, fewer than K steps were timed.",
        "IL runs T such steps on the graph as it is; T is what was timed (the paper: 20 for the MLP, 100 to 200 for",
        "RNN and CNN), and / BP / T is the cost of one step. At least one whole update was measured, nothing is",
        "extrapolated. The paper's figures are from two GTX 1080 Ti.",
        "",
        *time_table(two),
        "## Table 3: one condition left out",
        "",
        "As Table 1, on the levelled graph, with γ ≠ 1, with x₀ ≠ μ₀, with every update at step K − 1 instead of that",
        "of its level; and inference learning on the graph as it is: with T = 20, γ = 0.1, which settles elsewhere,",
        "and with predictions held at their forward values, T = K, γ = 1: backpropagation but for rounding.",
        "",
        *divergence_table(three, TABLE_3),
        "## Machine",
        "",
    ]
    lines += machines({1: one, 2: two, 3: three})
    return "\n".join(lines) + "\n"


#: Facts that change from row to row on one machine.
PASSING = ("date", "load")


def machines(tables: dict[int, dict[str, Any]]) -> list[str]:
    """A line for each machine and set of versions: which rows it measured, when, and how busy it was."""
    groups: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}
    for number, rows in tables.items():
        for name, entry in rows.items():
            lasting = ", ".join(f"{k} {v}" for k, v in sorted(entry["facts"].items()) if k not in PASSING)
            groups.setdefault(lasting, []).append((number, name, entry["facts"]))
    lines = []
    for lasting, measured in groups.items():
        parts = []
        for number, rows in tables.items():
            mine = [name for n, name, _ in measured if n == number]
            names = "all rows" if len(mine) == len(rows) else ", ".join(title(name) for name in mine)
            if mine:
                parts.append(f"Table {number}: {names}")
        loads = [x for _, _, entry in measured for x in entry["load"]]
        days = sorted({entry["date"][:10] for _, _, entry in measured})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        lines.append(f"- {lasting}; {when}, load {min(loads):.1f} to {max(loads):.1f}. {'; '.join(parts)}.")
    return lines


def facts(begun: tuple[float, float, float]) -> dict[str, Any]:
    """Where and with what, and how busy the machine was before and after."""
    import onnxruntime

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "load": [begun[0], os.getloadavg()[0]],
        "machine": f"{processor()} ({os.cpu_count()} cores)", "Python": platform.python_version(),
        "zilc": version("zilc"), "onnx": version("onnx"), "onnxruntime": onnxruntime.__version__,
        "numpy": version("numpy"),
    }  # fmt: skip


def fresh(entry: dict[str, Any] | None) -> bool:
    """Measured within the last day, with these versions on this machine."""
    if entry is None or "T" not in entry["facts"]["date"]:
        return False
    now, then = facts((0.0, 0.0, 0.0)), entry["facts"]
    lasting = all(then.get(k) == v for k, v in now.items() if k not in PASSING)
    return lasting and datetime.now(UTC) - datetime.fromisoformat(then["date"]) < timedelta(days=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--tables", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of Z-IL and BP in Table 2")
    parser.add_argument("--sessions", type=int, default=4, help="times that both are built anew for their rounds")
    parser.add_argument("--slow", default="literal,il", help="what else Table 2 measures; empty for neither")
    parser.add_argument("--il-steps", type=int, help="T of IL in Table 2 for every network; the table states it")
    parser.add_argument("--json", type=Path, default=DOCS / "paper.json", help="the rows measured so far")
    parser.add_argument("--write", action="store_true", help="write docs/PAPER.md and docs/paper.json")
    parser.add_argument("--resume", action="store_true", help="leave out rows measured here within the last day")
    options = parser.parse_args()
    console = Console(stderr=True)
    data: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}

    def write() -> None:
        DOCS.mkdir(exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
        (DOCS / "PAPER.md").write_text(page(data))

    for name, number in rows_of(options.networks, options.tables):
        if options.resume and fresh(data.get(f"table{number}", {}).get(name)):
            continue
        begun, clock = os.getloadavg(), time.perf_counter()
        console.print(f"{name}, Table {number} …", style="dim")
        if number == "2":
            peers = [label for label in options.slow.split(",") if label]
            row = timing(name, rounds=options.rounds, sessions=options.sessions, peers=peers, il_steps=options.il_steps)
        else:
            row = divergences(name, TABLE_1 if number == "1" else TABLE_3)
        old = data.get(f"table{number}", {}).get(name)
        if number == "2" and fresh(old):  # what was not measured now keeps its own ratio to BP at that time
            row = {**{k: v for k, v in old.items() if k.startswith(("literal_", "il_"))}, **row}
        seconds = round(time.perf_counter() - clock, 1)
        data.setdefault(f"table{number}", {})[name] = {**row, "seconds": seconds, "facts": facts(begun)}
        gc.collect()
        if options.write:  # row by row: what was measured is not lost
            write()
    if options.write:
        write()
    else:
        print(page(data))


def rows_of(networks: str, tables: str) -> Iterator[tuple[str, str]]:
    """(network, table) in the order of measurement: Tables 1 and 3 of a network one after the other share runs."""
    for name in networks.split(","):
        for number in sorted(filter(None, tables.split(",")), key="132".index):
            yield name, number


if __name__ == "__main__":
    main()
