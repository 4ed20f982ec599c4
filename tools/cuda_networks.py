"""Training steps on ONNX Runtime's CUDA provider: where their nodes run, and how exact they are.

    python tools/cuda_networks.py --json FILE                on a machine with a GPU
    python tools/cuda_networks.py --from-json FILE --write   docs/CUDA_NETWORKS.md of what was measured there
    python tools/cuda_networks.py --device cpu               the CPU provider in the place of CUDA

Of each network of the benchmark: Z-IL's first updates against those of plain reverse mode, against Z-IL's own once
more, and against those without CUDA graphs and with two sets of state, bit by bit; and against the CPU's.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.cuda_check import environment  # noqa: E402
from tools.pages import grid  # noqa: E402

DOCS = ROOT / "docs"
JSON, MARKDOWN = DOCS / "cuda_networks.json", DOCS / "CUDA_NETWORKS.md"
#: Networks and their batches, as in tools/bench.py.
NETWORKS = {"mlp3": 20, "rnn": 20, "transformer": 4, "decoder": 4, "alexnet": 20, "resnet18": 20}
UPDATES = 2
OPSET = 18
#: A kink of Relu or a pool that rounding takes to the other side changes what follows, so the first update is compared.
RATE = 1e-3


def emitted(network: str, **how: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A network's training step for CUDA, and a batch."""
    import zilc
    from zilc import models

    batch = NETWORKS[network]
    model = models.build(network, batch=batch)
    feeds = models.random_feeds(model, batch, np.random.default_rng(0), loss="cross-entropy")
    return zilc.emit_training(model, loss="cross-entropy", opset=OPSET, target="cuda", **how), feeds


def updated(step: Any, feeds: Mapping[str, Any], providers: Any, **how: Any) -> tuple[list[dict[str, np.ndarray]], Any]:
    """Its state after each of some updates, and the trainer."""
    import zilc

    trainer = zilc.Trainer(step, lr=RATE, providers=providers, **how)
    states = []
    for _ in range(UPDATES):
        trainer.step(feeds)
        states.append(trainer.state)
    return states, trainer


def same(a: Sequence[Mapping[str, np.ndarray]], b: Sequence[Mapping[str, np.ndarray]]) -> bool:
    """Whether all states have the same bits."""
    return all(x[name].tobytes() == y[name].tobytes() for x, y in zip(a, b, strict=True) for name in x)


def change_error(before: Mapping[str, Any], truth: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """The largest difference of a parameter's update, as a share of the largest of that parameter's."""
    errors = []
    for name, start in before.items():
        start = np.asarray(start, np.float64)
        expected, got = (np.asarray(state[name], np.float64) - start for state in (truth, found))
        size = np.abs(expected).max(initial=0.0)
        if size > 0:
            errors.append(float(np.abs(got - expected).max() / size))
    return max(errors, default=0.0)


def resolution(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The least difference that a parameter can show, as a share of its largest update: one unit in the last place.

    A first update may be a hundred thousandth of the weight that it is added to, which then holds two digits of it.
    """
    shares = []
    for name, start in before.items():
        start, end = np.asarray(start), np.asarray(after[name])
        moved = np.abs(end.astype(np.float64) - start.astype(np.float64)).max(initial=0.0)
        if moved > 0:
            shares.append(float(np.spacing(np.abs(start).max(initial=0.0)) / moved))
    return max(shares, default=0.0)


def placed(step: Any, providers: Any) -> dict[str, dict[str, int]]:
    """Operators by the provider that runs them, after onnxruntime's optimisation."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        step.model.SerializeToString(), options, providers=providers, enable_fallback=0
    )
    found: dict[str, collections.Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, collections.Counter()).update(node.op_type for node in part.get_nodes())
    return {name: dict(sorted(counts.items())) for name, counts in found.items()}


def examine(network: str, providers: Any) -> dict[str, Any]:
    """What the page says of a network."""
    step, feeds = emitted(network)
    first, trainer = updated(step, feeds, providers)
    found: dict[str, Any] = {
        "network": network, "batch": NETWORKS[network], "placed": placed(step, providers),
        "recorded": trainer._opened.captures, "in place": len(trainer._opened.over), "state": len(first[0]),
    }  # fmt: skip
    del trainer
    again, _ = updated(step, feeds, providers)
    found["again"] = same(first, again)
    del again
    plain, _ = updated(step, feeds, providers, cuda_graph=False)
    found["unrecorded"] = same(first, plain)
    del plain
    bp, _ = updated(emitted(network, algorithm="bp")[0], feeds, providers)
    found["bp"] = same(first, bp)
    found["bp off"] = change_error(step.state, first[0], bp[0])
    del bp
    cpu, _ = updated(step, feeds, ["CPUExecutionProvider"])
    found["cpu off"] = change_error(step.state, cpu[0], first[0])
    found["resolution"] = resolution(step.state, cpu[0])
    return found


HEADER = [
    "network", "batch", "nodes on CUDA", "on the CPU", "recorded", "state in place", "Z-IL = BP", "Z-IL = Z-IL again",
    "= without CUDA graphs", "Z-IL off BP", "off the CPU", "resolution",
]  # fmt: skip

READING = """Made by `tools/cuda_networks.py`: training steps (SGD, cross-entropy, float32, TF32 off, opset {opset},
target cuda) on ONNX Runtime's CUDA provider. *Recorded*: whether an update is replayed from a CUDA graph; *in place*:
how much of the state is written over itself. The next three columns compare all parameters after each of {updates}
updates, bit by bit. Z-IL and BP are the same graph, node by node, so where their bits differ, so do those of Z-IL run
twice: the provider then has kernels that add in the order in which threads arrive (sums over many rows, scattered sums,
some of cuDNN's gradients of images). *Off*: the largest difference of a first update, taken from the parameters before
and after it, as a share of that parameter's largest; *resolution* is the least difference that float32 parameters can
show in this way, for one unit in the last place of the largest weight, where it is the most."""


def cells(row: Mapping[str, Any]) -> list[str]:
    """A network's row for people."""
    counts = {name: sum(found.values()) for name, found in row["placed"].items()}
    bits = ["same bits" if row[key] else "differs" for key in ("bp", "again", "unrecorded")]
    return [
        row["network"], str(row["batch"]), str(counts.get("CUDAExecutionProvider", 0)),
        str(counts.get("CPUExecutionProvider", 0)), "yes" if row["recorded"] else "no",
        f"{row['in place']} of {row['state']}", *bits,
        *(f"{row[key]:.1e}" for key in ("bp off", "cpu off", "resolution")),
    ]  # fmt: skip


def markdown(made: Mapping[str, Any]) -> str:
    """docs/CUDA_NETWORKS.md."""
    facts = ", ".join(f"{key} {value}" if key != "date" else value for key, value in made["facts"].items())
    return "\n".join(
        [
            "# Training steps on CUDA", "",
            textwrap.fill(READING.format(opset=OPSET, updates=UPDATES), 110), "",
            f"{facts}.", "",
            *grid(HEADER, [cells(row) for row in made["rows"]]), "",
        ]
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    from zilc.errors import ZilcError
    from zilc.providers import choose_providers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--networks", default=",".join(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was measured")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="what was measured before, on another machine")
    parser.add_argument("--write", action="store_true", help="docs/CUDA_NETWORKS.md and docs/cuda_networks.json")
    options = parser.parse_args(arguments)
    said = Console(stderr=True, highlight=False)
    if options.from_json:
        made = json.loads(options.from_json.read_text(encoding="utf-8"))
        for row in made["rows"]:
            if "resolution" not in row:  # it depends on the network alone
                step, feeds = emitted(row["network"])
                row["resolution"] = resolution(step.state, updated(step, feeds, ["CPUExecutionProvider"])[0][0])
    else:
        with contextlib.suppress(ImportError):
            importlib.import_module("torch")  # onnxruntime then finds the CUDA libraries that came with it
        made = {"facts": environment(options.device), "rows": []}
        try:
            providers, _ = choose_providers(options.device)
            for network in options.networks.split(","):
                said.print(f"{network} …", style="dim")
                made["rows"].append(examine(network, providers))
                if options.json:  # what there is, should the machine go
                    options.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        except ZilcError as error:
            said.print(str(error), markup=False)
            return 1
    table = Table(*HEADER, box=None)
    for row in made["rows"]:
        table.add_row(*cells(row))
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)
    if options.write:
        JSON.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        MARKDOWN.write_text(markdown(made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
