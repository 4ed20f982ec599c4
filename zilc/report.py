"""The level structure of a model as data: what ``zilc levelize`` and ``zilc emit-training`` print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import onnx_io
from zilc.analysis import Structure, placed
from zilc.passes import identities
from zilc.passes.identities import Placement
from zilc.passes.parameters import Selection


def level_report(
    found: Structure, chosen: Selection | None, where: str, counted: Sequence[Placement] = ("edge", "shared")
) -> dict[str, Any]:
    """The level structure as data, under the placement ``where``; identities are counted for those of ``counted``."""
    flow, levels = found.flow, found.levels
    per_level = [0] * (levels.depth + 1)
    for level in levels.vertices:
        per_level[level] += 1
    longest = replace(found, levels=found.longest)
    costs = {name: identities.cost(flow, placed(longest, name).levels, name) for name in counted}
    skips = sorted((e for e in flow.edges if levels.gap(e) > 0), key=lambda e: (-levels.gap(e), e.consumer, e.operand))
    trained = set(chosen.parameters if chosen else ()) | set(chosen.inputs if chosen else ())
    reasons = dict(chosen.left_out) if chosen else {}
    everything = flow.tensors
    leaves = []
    for name in flow.leaves:
        tensor = everything[name]
        level, held = levels.leaves[name], isinstance(tensor, gs.Constant)
        leaves.append(
            {
                "name": name,
                "kind": "parameter" if held else "input",
                "shape": list(tensor.shape) if tensor.shape is not None else None,
                "level": level,
                "update_step": level - 1 if name in trained else None,
                "trained": name in trained,
                "consumers": len(flow.readers.get(name, [])),
                "reason": None if name in trained else reasons.get(name, "" if held else "model input"),
            }
        )
    return {
        "model": found.where,
        "opset": found.graph.opset,
        "outputs": found.outputs,
        "levels": levels.depth,
        "vertices": len(flow.vertices),
        "frozen_vertices": len(found.graph.nodes) - len(flow.vertices),
        "edges": len(flow.edges),
        "placement": where,
        "identities": {
            name: {
                "vertices": c.vertices,
                "bytes": c.bytes if c.formula.replace(",", "").isdigit() else None,
                "bytes_formula": c.formula,
            }
            for name, c in costs.items()
        },
        "per_level": [
            {"level": n, "vertices": count,
             **{f"identities_{name.replace('-', '_')}": c.by_level.get(n, 0) for name, c in costs.items()}}
            for n, count in enumerate(per_level)
        ],
        "skips": [
            {"tensor": e.tensor, "from": flow.names[e.source] if e.source is not None else e.tensor,
             "to": flow.names[e.consumer], "operand": e.operand, "from_level": levels.of(e),
             "to_level": levels.vertices[e.consumer], "identities": levels.gap(e)}
            for e in skips
        ],
        "vertex_levels": {flow.names[v]: n for v, n in enumerate(levels.vertices)},
        "leaves": leaves,
        "left_out": [{"name": n, "reason": r} for n, r in (chosen.left_out if chosen else [])],
        "notes": notes(found, chosen),
    }  # fmt: skip


def notes(found: Structure, chosen: Selection | None) -> list[str]:
    """What the user should know about the file: ties, merges, operators in inference form."""
    lines = list(found.prepared.notes)
    ops = [n.op for n in found.graph.nodes]
    if "BatchNormalization" in ops:
        count = ops.count("BatchNormalization")
        lines.append(f"{count} BatchNormalization vertices use their running statistics, which stay as they are")
    elif any(op in ("Conv", "ConvTranspose") for op in ops):
        lines.append(
            "no BatchNormalization in the file: exporters fold it into Conv when they export in inference mode"
        )
    if "Dropout" in ops:
        lines.append(f"{ops.count('Dropout')} Dropout vertices pass everything, as in inference")
    if chosen:
        merged = [n for n in chosen.parameters if len(found.flow.readers.get(n, ())) > 1]
        for name in merged[:8]:
            count = len(found.flow.readers[name])
            lines.append(
                f"parameter '{name}' is read {count} times: shared by the model, "
                "or equal constants that the exporter merged"
            )
        if len(merged) > 8:
            lines.append(f"and {len(merged) - 8} more parameters that are read several times")
        lines += _looks_tied(found, chosen)
    for b, (a, transposed) in found.prepared.ties.items():
        lines.append(f"'{b}' is tied to '{a}'{' (transposed)' if transposed else ''}")
    return lines


def _looks_tied(found: Structure, chosen: Selection) -> list[str]:
    """Pairs of trained matrices, equal or transposed in a sample of entries: a tied weight that was written twice."""
    everything = found.flow.tensors
    by_shape: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in chosen.parameters:
        tensor = everything[name]
        shape = tuple(int(n) for n in tensor.shape)
        if len(shape) < 2 or isinstance(tensor._values, onnx_io.FilledValues):
            continue
        # A matrix and its transpose land in the same drawer.
        by_shape.setdefault((str(tensor.dtype), tuple(sorted(shape))), []).append(name)
    lines = []
    for drawer in by_shape.values():
        samples: dict[bytes, str] = {}
        for name in drawer:
            array = onnx_io.values(everything[name])
            for transposed in (False, True) if array.ndim == 2 else (False,):
                view = array.T if transposed else array
                rows = np.linspace(0, view.shape[0] - 1, 8).astype(int)
                key = np.ascontiguousarray(view[rows][..., np.linspace(0, view.shape[-1] - 1, 8).astype(int)]).tobytes()
                key += str(view.shape).encode()
                other = samples.get(key)
                if other is not None and other != name:
                    how = "the transpose of" if transposed else "equal to"
                    lines.append(f"'{name}' looks {how} '{other}' (sampled): a tied weight? --tie {other}={name}")
                    break
                if not transposed:
                    samples.setdefault(key, name)
    return lines
