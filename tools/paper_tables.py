"""The paper's Tables 1, 2 and 3 beside ours: ``python tools/paper_tables.py [--networks mlp3,rnn] [--tables 1,3]``.

Table 1 is the divergence of Z-IL's update from BP's with levelling and without, Table 2 the time of an update by BP, IL
and Z-IL, Table 3 the divergence when one condition of the theorem is left out.  Each network is a row; ``--write`` puts
the rows into docs/paper.json, beside those measured before, and prints docs/PAPER.md from it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import zilc
from zilc import models
from zilc.executors import executor

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
#: Sizes at which divergence is looked at (every step of the dynamics, in float64 too); where absent, the full ones.
DIVERGENCE: dict[str, tuple[dict[str, Any], int]] = {
    "alexnet": ({"image": 63, "width": 16, "hidden": 128, "classes": 100}, 4),
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
}
#: A round of a peer takes about this long.
ROUND_MS = 400.0


# --- divergence: Tables 1 and 3 ---------------------------------------------------------------------


class Gradients:
    """One network on one batch: BP's gradients, and how far others are from them."""

    def __init__(self, name: str, dtype: str) -> None:
        sizes, batch = DIVERGENCE.get(name, ({}, NETWORKS[name]["batch"]))
        self.model = models.build(name, dtype=dtype, **sizes)
        self.feeds = models.random_feeds(self.model, batch, np.random.default_rng(0), loss="cross-entropy")
        self.size = {**sizes, "batch": batch}
        self.bp = self.gradients(algorithm="bp")

    def gradients(self, **options: Any) -> dict[str, np.ndarray]:
        step = zilc.emit_training(self.model, loss="cross-entropy", outputs="grad", **options)
        run = executor(step.model)
        made = run({**self.feeds, **{n: np.asarray(step.state[n]) for n in step.state}})
        self.ran = run.name
        return {p["name"]: made[p["grad"]] for p in step.signature["parameters"]}

    def divergence(self, **options: Any) -> float | None:
        """|a - b| / |b| over all parameters at once; None where an update is not finite."""
        found = self.gradients(**options)
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
        result["ran"][dtype] = gradients.ran
    report = zilc.levelize(gradients.model, identities="none").report
    result["levels"] = report["levels"]
    result["identities"] = {kind: cost["vertices"] for kind, cost in report["identities"].items()}
    return result


# --- time: Table 2 ----------------------------------------------------------------------------------


class Timed:
    """A training graph under way."""

    def __init__(self, model: Any, feeds: dict[str, np.ndarray], **options: Any) -> None:
        step = zilc.emit_training(model, loss="cross-entropy", **options)
        self.operators = Counter(node.op_type for node in step.model.graph.node)
        self.levels = step.signature["levels"]
        self.trainer, self.feeds = zilc.Trainer(step, lr=0.01), feeds
        self.providers = self.trainer.providers

    def ms(self, updates: int = 1) -> float:
        """Mean time of an update."""
        begun = time.perf_counter()
        for _ in range(updates):
            self.trainer.step(self.feeds)
        return (time.perf_counter() - begun) * 1e3 / updates


def timing(name: str, *, rounds: int, peers: list[str], il_steps: int | None) -> dict[str, Any]:
    """BP and Z-IL in turns, round by round; then the literal schedule and IL, at least one whole update each."""
    batch, steps = NETWORKS[name]["batch"], il_steps or NETWORKS[name]["steps"]
    model = models.build(name)
    feeds = models.random_feeds(model, batch, np.random.default_rng(0), loss="cross-entropy")
    zil, bp = Timed(model, feeds), Timed(model, feeds, algorithm="bp")
    for peer in (zil, bp):
        peer.ms()
    updates = max(1, int(ROUND_MS / max(zil.ms(2), 1e-3)))
    taken: dict[str, list[float]] = {"zil": [], "bp": []}
    for count in range(rounds):
        for label, peer in (("zil", zil), ("bp", bp))[:: 1 if count % 2 else -1]:
            taken[label].append(peer.ms(updates))
    ratios = np.asarray(taken["zil"]) / np.asarray(taken["bp"])
    drawn = np.median(np.random.default_rng(0).choice(ratios, (2000, rounds)), axis=1)
    result = {
        "network": name, "batch": batch, "levels": zil.levels, "providers": zil.providers, "rounds": rounds,
        "nodes": sum(zil.operators.values()), "same_operators": zil.operators == bp.operators,
        "bp_ms": float(np.median(taken["bp"])), "zil_ms": float(np.median(taken["zil"])),
        "zil_bp": [float(np.median(ratios)), *(float(x) for x in np.percentile(drawn, (2.5, 97.5)))],
    }  # fmt: skip
    del zil
    slow: dict[str, dict[str, Any]] = {
        "literal": {"schedule": "literal"}, "il": {"algorithm": "il", "steps": steps, "gamma": 0.1}
    }  # fmt: skip
    for label in peers:
        peer = Timed(model, feeds, **slow[label])
        first = peer.ms()  # allocation and, on a GPU, choice of kernels are part of it
        fitting = int(5 * ROUND_MS / first)
        result[f"{label}_updates"] = max(1, fitting)
        result[f"{label}_ms"] = peer.ms(fitting) if fitting else first
        beside = bp.ms(updates)  # BP at that time, on a machine whose speed drifts
        result[f"{label}_bp"] = result[f"{label}_ms"] / beside
        del peer
        gc.collect()
    if "il" in peers:
        result["il_steps"] = steps
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
        size = ", ".join(f"{k} {v}" for k, v in entry["size"].items())
        cells = [shown(entry["rows"][row][dtype]) for row in rows for dtype in ("float64", "float32")]
        lines.append([title(name), size, str(entry["levels"]), *cells])
    paper = {"Z-IL": "0", "Z-IL, literal": "", "IL": ""}
    lines.append(["*the paper*", "", "", *(cell for row in rows for cell in (paper.get(row, "not 0"), ""))])
    return grid(header, lines)


def time_table(found: dict[str, Any]) -> list[str]:
    header = [
        "network", "batch", "BP ms", "Z-IL ms", "Z-IL / BP", "95 % interval", "operators", "K", "literal ms",
        "literal / BP", "T", "IL ms", "IL / BP", "paper: BP", "IL", "Z-IL", "Z-IL / BP", "IL / BP",
    ]  # fmt: skip
    lines = []
    for name, entry in found.items():
        bp, il, zil = PAPER_MS.get(name, (None, None, None))
        paper = [f"{x:g}" if x else "" for x in (bp, il, zil)]
        ratios = [f"{zil / bp:.3f}", f"{il / bp:.0f}"] if bp and il and zil else ["", ""]
        middle, low, high = entry["zil_bp"]
        lines.append(
            [
                title(name), str(entry["batch"]), f"{entry['bp_ms']:.3g}", f"{entry['zil_ms']:.3g}", f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{entry['nodes']}, {'the same' if entry['same_operators'] else 'others'}" if "nodes" in entry else "",
                str(entry["levels"]),
                *(f"{entry[k]:.3g}" if k in entry else "" for k in ("literal_ms", "literal_bp")),
                str(entry.get("il_steps", "")),
                *(f"{entry[k]:.3g}" if k in entry else "" for k in ("il_ms", "il_bp")), *paper, *ratios,
            ]
        )  # fmt: skip
    return grid(header, lines)


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
        "array in memory: the literal schedule may then differ by less than a unit in the last place.",
        "",
        *divergence_table(one, TABLE_1),
        "Identity vertices by placement: "
        + "; ".join(
            f"{title(n)} " + ", ".join(f"{kind} {count}" for kind, count in e["identities"].items())
            for n, e in one.items()
        )
        + ".",
        "",
        "## Table 2: time of an update",
        "",
        "Milliseconds, the whole step with loss and SGD update through `zilc.Trainer`. Z-IL and BP went in turns in",
        "one run; given is the median of the ratios round by round with a bootstrapped 95 % interval: where it holds 1",
        "on a busy machine, there is no difference. *operators* counts the nodes of Z-IL's graph, and says whether",
        "BP's has as many of each kind. *literal* is Z-IL's",
        "dynamics as they are written: all vertices in all K steps, and one round more. IL runs T such steps on the",
        "graph as it is; at least one whole update was measured, nothing is extrapolated. The paper's figures are from",
        "two GTX 1080 Ti.",
        "",
        *time_table(two),
        "## Table 3: one condition left out",
        "",
        "As Table 1, on the levelled graph, with γ ≠ 1, with x₀ ≠ μ₀, with every update at step K − 1 instead of that",
        "of its level; and inference learning (T = 20, γ = 0.1), which has none of them.",
        "",
        *divergence_table(three, TABLE_3),
        "## Machine",
        "",
    ]
    for n, rows in ((1, one), (2, two), (3, three)):
        for name, entry in rows.items():
            facts = entry["facts"]
            lines.append(f"- Table {n}, {title(name)}: " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".")
    return "\n".join(lines) + "\n"


def facts(begun: tuple[float, float, float]) -> dict[str, Any]:
    """Where and with what, and how busy the machine was."""
    import onnxruntime

    load = " to ".join(f"{x:.1f}" for x in (begun[0], os.getloadavg()[0]))
    return {
        "date": date.today().isoformat(), "machine": f"{_cpu()} ({os.cpu_count()} cores, load {load})",
        "Python": platform.python_version(), "zilc": version("zilc"), "onnx": version("onnx"),
        "onnxruntime": onnxruntime.__version__, "numpy": version("numpy"),
    }  # fmt: skip


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--tables", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of Z-IL and BP in Table 2")
    parser.add_argument("--slow", default="literal,il", help="what else Table 2 measures; empty for neither")
    parser.add_argument("--il-steps", type=int, help="T of IL in Table 2 instead of the paper's; the table states it")
    parser.add_argument("--json", type=Path, default=DOCS / "paper.json", help="the rows measured so far")
    parser.add_argument("--write", action="store_true", help="write docs/PAPER.md and docs/paper.json")
    options = parser.parse_args()
    console = Console(stderr=True)
    data: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    peers = [name for name in options.slow.split(",") if name]
    for name in options.networks.split(","):
        for number in options.tables.split(","):
            begun = os.getloadavg()
            console.print(f"{name}, Table {number} …", style="dim")
            if number == "2":
                row = timing(name, rounds=options.rounds, peers=peers, il_steps=options.il_steps)
            else:
                row = divergences(name, TABLE_1 if number == "1" else TABLE_3)
            data.setdefault(f"table{number}", {})[name] = {**row, "facts": facts(begun)}
            gc.collect()
            if options.write:  # row by row: what was measured is not lost
                DOCS.mkdir(exist_ok=True)
                options.json.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
                (DOCS / "PAPER.md").write_text(page(data))
    if not options.write:
        print(page(data))


if __name__ == "__main__":
    main()
