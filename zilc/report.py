"""The level structure of a model as data: what ``zilc levelize`` and ``zilc emit-training`` print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import ir, onnx_io
from zilc.analysis import Structure, placed
from zilc.graph import PRECISION
from zilc.passes import identities
from zilc.passes.identities import Placement
from zilc.passes.mixed_precision import MixedPrecision
from zilc.passes.parameters import Selection
from zilc.passes.train_mode import TrainMode


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
    lines += _inference_form(found) if found.mode is None else _training_form(found.mode)
    if found.mixed is not None:
        lines += _mixed_precision(found.mixed)
    if chosen:
        merged = {n: count for n in chosen.parameters if (count := _reads(found, n)) > 1}
        for name, count in list(merged.items())[:8]:
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


def _reads(found: Structure, name: str) -> int:
    """How often the model reads a leaf: a cast that mixed precision put in stands for its own readers."""
    count = 0
    for edge in found.flow.readers.get(name, ()):
        node = found.flow.vertices[edge.consumer]
        count += len(found.flow.readers.get(node.outputs[0].name, ())) if getattr(node, PRECISION, False) else 1
    return count


def _inference_form(found: Structure) -> list[str]:
    """Operators that differ between training and inference, as the file has them."""
    lines = []
    ops = [n.op for n in found.graph.nodes]
    own = sum(1 for n in found.graph.nodes if n.op == "BatchNormalization" and n.attrs.get("training_mode"))
    if own:
        lines.append(
            f"{own} BatchNormalization vertices are in training form in the file: they take batch statistics, and "
            "their running ones stay as they are; --mode train carries them"
        )
    if ops.count("BatchNormalization") > own:
        count = ops.count("BatchNormalization") - own
        lines.append(f"{count} BatchNormalization vertices use their running statistics, which stay as they are")
    elif not own and any(op in ("Conv", "ConvTranspose") for op in ops):
        lines.append(
            "no BatchNormalization in the file: exporters fold it into Conv when they export in inference mode"
        )
    drawn = sum(1 for n in found.graph.nodes if n.op == "Dropout" and _draws(n))
    if drawn:
        lines.append(
            f"{drawn} Dropout vertices are in training form in the file: the runtime draws their masks, others each "
            "time; --mode train draws them from a seed"
        )
    if ops.count("Dropout") > drawn:
        lines.append(f"{ops.count('Dropout') - drawn} Dropout vertices pass everything, as in inference")
    return lines


def _draws(node: gs.Node) -> bool:
    """A Dropout whose training_mode is on, or decided at run time."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return False
    return not isinstance(node.inputs[2], gs.Constant) or bool(np.any(ir.values(node.inputs[2])))


def _training_form(mode: TrainMode) -> list[str]:
    """What the training mode turned, or that there was nothing."""
    lines = []
    if mode.batch_normalizations:
        lines.append(
            f"{len(mode.batch_normalizations)} BatchNormalization vertices take batch statistics; their running ones "
            f"({len(mode.carried)} tensors) are carried"
        )
    if mode.dropouts:
        lines.append(
            f"{len(mode.dropouts)} Dropout vertices drop by a mask an update, drawn from '{mode.seed}', '{mode.step}', "
            "the vertex and the element"
        )
    if mode.split:
        shown = ", ".join(f"'{name}' (in the file: '{shared}')" for name, shared in list(mode.split.items())[:4])
        more = f" and {len(mode.split) - 4} more" if len(mode.split) > 4 else ""
        lines.append(
            "running statistics that shared a tensor with something else, as exporters merge equal constants, have "
            f"one of their own: {shown}{more}"
        )
    if not mode.turned:
        lines.append(
            "--mode train has nothing to turn: the file holds no BatchNormalization, and no Dropout that drops "
            "anything; exporters fold the one into Conv and leave the other out when they export in inference mode"
        )
    return lines


def _mixed_precision(mixed: MixedPrecision) -> list[str]:
    """How much computes in the low type, and what cannot."""
    single = sum(mixed.single.values())
    lines = [
        f"{len(mixed.vertices)} vertices compute in {mixed.dtype}, {single} in float32; {mixed.casts} casts lie between"
    ]
    for op, opset in sorted(mixed.refused.items()):
        remedy = f"--opset {opset} has one" if opset else "no opset has one"
        lines.append(f"{op} has no {mixed.dtype} form at this opset and stays in float32: {remedy}")
    return lines


def _looks_tied(found: Structure, chosen: Selection) -> list[str]:
    """Pairs of trained matrices, equal or transposed in a sample of entries: a tied weight that was written twice."""
    everything = found.flow.tensors
    by_shape: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in chosen.parameters:
        tensor = everything[name]
        shape = tuple(int(n) for n in tensor.shape)
        if len(shape) < 2 or isinstance(tensor._values, ir.FilledValues):
            continue
        # A matrix and its transpose land in the same drawer.
        by_shape.setdefault((str(tensor.dtype), tuple(sorted(shape))), []).append(name)
    lines = []
    for drawer in by_shape.values():
        if len(drawer) < 2:
            continue
        samples: dict[bytes, str] = {}
        for name in drawer:
            array = onnx_io.read_here_and_there(ir.values(everything[name]))
            for transposed in (False, True) if array.ndim == 2 else (False,):
                view = array.T if transposed else array
                rows = np.linspace(0, view.shape[0] - 1, 8).astype(int)
                columns = np.linspace(0, view.shape[-1] - 1, 8).astype(int)
                # Entry by entry: whole rows of the transpose would read all of a matrix that lies in another file.
                key = np.ascontiguousarray(view[rows[:, None], ..., columns]).tobytes()
                key += str(view.shape).encode()
                other = samples.get(key)
                if other is not None and other != name:
                    how = "the transpose of" if transposed else "equal to"
                    lines.append(f"'{name}' looks {how} '{other}' (sampled): a tied weight? --tie {other}={name}")
                    break
                if not transposed:
                    samples.setdefault(key, name)
    return lines
