"""Least placements at scale: ``python tools/placement.py [--vertices 20000] [--widths 12,200,4000]``.

Random graphs with skips of every length are levelled by *edge*, *shared* and *min*: how many identities each needs,
what *min-bytes* saves, and how long the two linear programs take.  ``--models`` does the same for the paper's
networks at full size and the nine image networks that ship with onnx.  It stops with an error where a placement is
worse than the one before it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zilc import models
from zilc.analysis import structure
from zilc.graph import Dataflow
from zilc.passes import identities
from zilc.passes.identities import flow_of
from zilc.passes.levels import find_levels
from zilc.passes.placement import least_identities, needed

#: The networks that ship with onnx, without their weights.
ZOO = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def random_flow(vertices: int, seed: int, width: int) -> Dataflow:
    """A graph of Add and Tanh: most operands are near, some anywhere before, so that there is slack all over.

    Args:
        width: how far back a near operand may lie; the wider, the fewer levels.
    """
    rng = np.random.default_rng(seed)
    made = [gs.Variable("x", np.float32, [int(rng.integers(1, 9)), 8])]
    nodes = []
    for k in range(vertices - 1):
        near = len(made) - 1 - rng.integers(0, min(len(made), width))
        reach = len(made) if rng.random() < 0.1 else min(len(made), 3 * width)
        far = len(made) - 1 - rng.integers(0, reach)
        operands = [made[near], made[far]] if rng.random() < 0.6 else [made[near]]
        out = gs.Variable(f"t{k}", np.float32, [int(rng.integers(1, 9)), 8])
        nodes.append(gs.Node("Add" if len(operands) == 2 else "Tanh", f"n{k}", inputs=operands, outputs=[out]))
        made.append(out)
    # Whatever nobody reads goes into the output, so that all are active.
    read = {t.name for node in nodes for t in node.inputs}
    ends = [t for t in made if t.name not in read]
    last = gs.Variable("y", np.float32, [8, 8])
    nodes.append(gs.Node("Sum", "last", inputs=ends, outputs=[last]))
    return flow_of(gs.Graph(nodes=nodes, inputs=[made[0]], outputs=[last], opset=18), ["y"])


def networks() -> Iterator[tuple[str, Dataflow]]:
    """The paper's networks, and the nine of onnx."""
    for name in models.names():
        yield name, structure(models.build(name)).flow
    for path in sorted(ZOO.glob("light_*.onnx")):
        yield path.stem, structure(path).flow


def line(name: str, flow: Dataflow) -> str:
    """Sizes, identities by each placement, and seconds."""
    levels = find_levels(flow)
    counts = {"edge": identities.cost(flow, levels, "edge").vertices, "shared": needed(flow, levels)}
    begun = time.perf_counter()
    counts["min"] = needed(flow, least_identities(flow))
    seconds = time.perf_counter() - begun
    shared = needed(flow, levels, by="bytes")
    begun = time.perf_counter()
    least = needed(flow, least_identities(flow, by="bytes"), by="bytes")
    others = time.perf_counter() - begun
    if not counts["min"] <= counts["shared"] <= counts["edge"] or least > shared:
        raise SystemExit(f"{name}: {counts}, bytes {least} against {shared}: a larger placement was taken")
    return (
        f"{name:24} vertices {len(flow.vertices):6}  edges {len(flow.edges):6}  K {levels.depth:6}  "
        + "  ".join(f"{kind} {count:8}" for kind, count in counts.items())
        + f"  min-bytes/shared {least / shared if shared else 1.0:.3f}  seconds {seconds:.1f} and {others:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vertices", type=int, default=20_000)
    parser.add_argument("--widths", default="12,200,4000", help="one random graph each")
    parser.add_argument("--models", action="store_true", help="real networks instead of random graphs")
    options = parser.parse_args()
    if options.models:
        for name, flow in networks():
            print(line(name, flow), flush=True)
    else:
        for width in map(int, options.widths.split(",")):
            print(line(f"random, width {width}", random_flow(options.vertices, 0, width)), flush=True)


if __name__ == "__main__":
    main()
