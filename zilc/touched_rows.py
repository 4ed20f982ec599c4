"""Embeddings: rows that no index of the batch names are neither summed, nor read, nor written.

The gradient of a table is emitted as a sum over a table of zeros, in operators that every provider has.  Where
onnxruntime runs on the CPU and writes state over itself, most of that is passing over rows in which nothing happens: a
table of 30,000 rows, of which a batch names some hundred.  Here the sums are made of the named rows alone, and only
these are written.  Every sum adds the same numbers in the same order, so no bit of the state changes (but for the sign
of a zero, where a table is tied and both it and another part of its gradient hold -0).

Before:  t.next = Sub(t, ScatterElements(zeros of t's shape, rows, g, reduction=add))
After:   named, place = Unique(rows)
         t.next = ScatterND(t, named, Sub(Gather(t, named), ScatterElements(zeros, place, g, reduction=add)))

and the same where a table is also the last layer's weight, whose update is made first or whose gradient is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from zilc import onnx_io
from zilc.in_place import operands

#: Elements of a table above which it pays; below, the table is in the cache, and the nodes cost more.
LARGE = 1 << 20


@dataclass(frozen=True)
class _Sum:
    """``node`` adds to ``base``, or takes from it, the sums of ``updates`` over ``rows``, each update's row [n].

    ``zero`` is what the sums begin with, a scalar; ``unread`` is what only the sums over the whole table needed.
    """

    node: onnx.NodeProto
    base: str
    updates: str
    rows: str
    zero: str
    unread: frozenset[str]


def touch_rows(model: onnx.ModelProto, pairs: Iterable[tuple[str, str]]) -> onnx.ModelProto:
    """A copy in which tables are changed at the rows that a batch names; the model itself where it has none.

    Args:
        model: a training graph.
        pairs: (input, output) that is fed back to it; nothing but what makes such an output is looked at.
    """
    sums = {found.node.output[0]: found for found in _sums(model.graph, pairs)}
    if not sums:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    unread = frozenset().union(*(found.unread for found in sums.values()))
    nodes = [node for node in made.graph.node if node.output[0] not in unread]
    del made.graph.node[:]
    for node in nodes:
        found = sums.get(node.output[0])
        if found is None:
            made.graph.node.append(node)
        else:
            made.graph.node.extend(_at_rows(made.graph, found))
    return made


def _sums(graph: onnx.GraphProto, pairs: Iterable[tuple[str, str]]) -> Iterator[_Sum]:
    producer = {name: node for node in graph.node for name in node.output if name}
    readers = Counter(o.name for o in graph.output)
    for node in graph.node:
        readers.update(operands(node))
    shapes = {i.name: onnx_io.stated_shape(i.type.tensor_type) for i in graph.input}
    held = {t.name: t for t in graph.initializer}
    for table, following in pairs:
        update = producer.get(following)
        if update is None or update.op_type != "Sub" or not _large(shapes.get(table)):
            continue
        product = producer.get(update.input[0])
        updated = product is not None and product.op_type == "Gemm" and list(product.input[2:]) == [table]
        if update.input[0] != table and not (updated and readers[update.input[0]] == 1):
            continue
        gradient = producer.get(update.input[1])
        if gradient is None or readers[update.input[1]] > 1:
            continue
        candidates = [(update, *update.input)]
        if gradient.op_type == "Add":
            candidates = [(gradient, *gradient.input), (gradient, *reversed(gradient.input))]
        for node, base, changed_by in candidates:
            scatter = producer.get(changed_by)
            if scatter is None or scatter.op_type != "ScatterElements" or readers[changed_by] > 1:
                continue
            operand = _rows_and_zero(scatter, producer, held)
            if operand is not None:
                unread = {changed_by, *(name for name in scatter.input[:2] if readers[name] == 1)}
                column = producer[scatter.input[1]].input[0]
                if scatter.input[1] in unread and readers[column] == 1:
                    unread.add(column)
                yield _Sum(node, base, scatter.input[2], *operand, frozenset(unread))
                break


def _large(shape: Sequence[object] | None) -> bool:
    sizes = [n for n in shape or () if isinstance(n, int)]
    return shape is not None and len(sizes) == len(shape) == 2 and sizes[0] * sizes[1] >= LARGE


def _rows_and_zero(
    scatter: onnx.NodeProto, producer: dict[str, onnx.NodeProto], held: dict[str, onnx.TensorProto]
) -> tuple[str, str] | None:
    """The row of each update, a tensor of one dimension, and a scalar 0, if whole rows are added to zeros."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in scatter.attribute}
    base, wide = producer.get(scatter.input[0]), producer.get(scatter.input[1])
    if attributes.get("reduction") != b"add" or attributes.get("axis", 0) != 0:
        return None
    if base is None or base.op_type != "Expand" or not _is(held.get(base.input[0]), 0):
        return None
    column = producer.get(wide.input[0]) if wide is not None and wide.op_type == "Expand" else None
    if column is None or column.op_type != "Unsqueeze" or len(column.input) < 2:
        return None
    # [n, 1], not [1, n]: one row for all of an update.
    return (column.input[0], base.input[0]) if _is(held.get(column.input[1]), 1) else None


def _is(tensor: onnx.TensorProto | None, value: int) -> bool:
    """Whether a constant is one number, this one."""
    return tensor is not None and np.array_equal(onnx.numpy_helper.to_array(tensor).reshape(-1), [value])


def _at_rows(graph: onnx.GraphProto, found: _Sum) -> Iterator[onnx.NodeProto]:
    """The nodes that take the place of a sum over the table and of what joins it with the table."""
    prefix = f"{found.node.output[0]}.rows"
    second = f"{prefix}/axis1"
    graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([1], np.int64), second))

    def made(kind: str, inputs: list[str], *names: str, **attributes: Any) -> onnx.NodeProto:
        outputs = [f"{prefix}/{name}" if name else "" for name in names]
        return onnx.helper.make_node(kind, inputs, outputs, f"{prefix}/{names[0] or names[-1]}", **attributes)

    # A row counted from the end is the same row: both must be one entry.  Rows that are not there the Gather refuses.
    yield made("Shape", [found.base], "size", start=0, end=1)
    yield made("Cast", [found.rows], "given", to=onnx.TensorProto.INT64)
    yield made("Mod", [f"{prefix}/given", f"{prefix}/size"], "row")
    yield made("Unique", [f"{prefix}/row"], "named", "", "place")
    yield made("Shape", [found.updates], "width", start=1, end=2)
    yield made("Shape", [f"{prefix}/named"], "count")
    yield made("Concat", [f"{prefix}/count", f"{prefix}/width"], "shape", axis=0)
    yield made("Expand", [found.zero, f"{prefix}/shape"], "zeros")
    yield made("Unsqueeze", [f"{prefix}/place", second], "column")
    yield made("Shape", [found.updates], "whole")
    yield made("Expand", [f"{prefix}/column", f"{prefix}/whole"], "wide")
    scattered = [f"{prefix}/zeros", f"{prefix}/wide", found.updates]
    yield made("ScatterElements", scattered, "sums", axis=0, reduction="add")
    yield made("Gather", [found.base, f"{prefix}/named"], "before")
    yield made(found.node.op_type, [f"{prefix}/before", f"{prefix}/sums"], "after")
    yield made("Unsqueeze", [f"{prefix}/named", second], "at")
    yield onnx.helper.make_node(
        "ScatterND", [found.base, f"{prefix}/at", f"{prefix}/after"], [found.node.output[0]], found.node.name
    )
