"""Sequences and optionals of known content are taken apart: what remains are their tensors.

A cotangent is a tensor.  Exporters write sequences for lists of tensors whose length is known (split, chunk, stack),
and ask for their elements by constant positions, so that each element can be named before levels are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import ir
from zilc.emit import Emitter
from zilc.graph import Rebuild, copy_node, copy_tensor, is_standard

#: A tensor, a sequence of values, or an optional that holds nothing.
Value = Any

OPERATORS = frozenset(
    {
        "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceAt", "SequenceLength",
        "ConcatFromSequence", "SplitToSequence", "SequenceMap", "Optional", "OptionalGetElement", "OptionalHasElement",
    }
)  # fmt: skip
_ABSENT = object()


def resolve_sequences(graph: gs.Graph) -> gs.Graph:
    """A new graph without the sequences and optionals whose content is known.

    Requires: acyclic(graph).
    Ensures:  outputs equal to those of graph; an operator whose sequence is not known stays as it is.

    Before:  x -> SplitToSequence -> s -> SequenceAt(0) -> a
    After:   x -> Split -> a, b
    """
    if not any(node.op in OPERATORS and is_standard(node) for node in graph.nodes):
        return graph
    return _Resolver(graph).run()


@dataclass(frozen=True)
class _Chunks:
    """What SplitToSequence makes by a length known at run time: a sequence of unknown length, with known elements."""

    x: gs.Tensor
    size: gs.Tensor
    axis: int


@dataclass
class _Resolver:
    graph: gs.Graph
    #: Sequences and optionals by the name of the tensor that holds them; elements are tensors of the new graph.
    held: dict[str, Value] = field(default_factory=dict)
    known: list[gs.Node] = field(default_factory=list)

    def run(self) -> gs.Graph:
        self.rebuild = Rebuild(self.graph)
        self.op = Emitter(gs.Graph(nodes=self.rebuild.nodes, opset=self.graph.opset), Emitter(self.graph).names)
        self.outputs = {t.name for t in self.graph.outputs}
        for node in self.graph.nodes:
            self.visit(node, {})
        made = self.rebuild.finish()
        needed = {t.name for t in made.outputs}
        known = {id(node) for node in self.known}
        kept = []
        for node in reversed(made.nodes):
            if id(node) in known and not any(t.name in needed for t in node.outputs):
                node.inputs.clear()
                node.outputs.clear()
                continue
            needed.update(t.name for t in node.inputs)
            for inner in node.attrs.values():
                if isinstance(inner, gs.Graph):
                    needed.update(inner._foreign_tensors())
            kept.append(node)
        made.nodes = kept[::-1]
        return made

    def visit(self, node: gs.Node, local: Mapping[str, Value]) -> None:
        """Append a node, or what it comes to; ``local`` names the values of the body that it stands in."""
        values = [self.look_up(t, local) for t in node.inputs]
        with self.op.place(node.name or next((t.name for t in node.outputs if t.name), node.op)):
            results = self.evaluate(node, values, local)
        if results is None and not local:
            self.rebuild.add(node)
        elif results is None:
            self.copy(node, values, local)
        elif local:
            self.held.update((local[t.name], value) for t, value in zip(node.outputs, results, strict=True))
        else:
            if not all(isinstance(value, gs.Tensor) for value in results):
                # It stays for readers that want the sequence itself, the model's outputs among them.
                self.known.append(self.rebuild.add(node))
            for tensor, value in zip(node.outputs, results, strict=True):
                self.name(tensor, value)

    def copy(self, node: gs.Node, values: list[Value], local: Mapping[str, Value]) -> None:
        """An ordinary node of a body, on the values of this element."""
        inputs = [
            v if isinstance(v, gs.Tensor) else self.rebuild.tensor(t) for t, v in zip(node.inputs, values, strict=True)
        ]
        outputs = [copy_tensor(t, local[t.name]) if t.name else gs.Variable.empty() for t in node.outputs]
        made = copy_node(node, inputs, outputs)
        made.name = self.op.fresh(node.name or node.op)
        self.rebuild.nodes.append(made)
        self.held.update((tensor.name, tensor) for tensor in outputs)

    def look_up(self, tensor: gs.Tensor, local: Mapping[str, Value]) -> Value:
        if not tensor.name:
            return _ABSENT
        name = local.get(tensor.name, tensor.name)
        if not isinstance(name, str):
            return name  # an argument of the body
        if name in self.held:
            return self.held[name]
        if _holds_tensor(tensor):
            return self.rebuild.tensor(tensor)
        return None

    def name(self, tensor: gs.Tensor, value: Value) -> None:
        """The tensor of the old graph has this value now."""
        if not isinstance(value, gs.Tensor):
            self.held[tensor.name] = value
            return
        if tensor.name in self.outputs:
            shape = value.shape if tensor.shape is None else tensor.shape
            out = gs.Variable(tensor.name, value.dtype, shape)
            node = gs.Node("Identity", name=self.op.fresh(f"{tensor.name}.element"), inputs=[value], outputs=[out])
            node.metadata, node.doc_string = {}, ""
            self.rebuild.nodes.append(node)
            value = out
        self.rebuild.tensors[tensor.name] = value
        self.held[tensor.name] = value

    # -- what an operator comes to --

    def evaluate(self, node: gs.Node, values: list[Value], local: Mapping[str, Value]) -> list[Value] | None:
        """The values of a node's outputs; None where it is an ordinary operator, or its sequence is not known."""
        if not is_standard(node):
            return None
        if node.op == "Identity" and isinstance(values[0], (list, type(_ABSENT))) and values[0] is not None:
            return [values[0]]
        rule = getattr(self, f"_{node.op}", None)
        if rule is None or node.op not in OPERATORS:
            return None
        if any(v is None for v in values):
            return None
        if any(isinstance(v, _Chunks) for v in values) and node.op != "SequenceAt":
            return None
        result = rule(node, values, local)
        return None if result is None else (result if node.op == "SequenceMap" else [result])

    def _position(self, values: list[Value], k: int, default: int) -> int | None:
        if len(values) <= k or values[k] is _ABSENT:
            return default
        value = self._constant(values[k])
        return None if value is None else int(value.reshape(-1)[0])

    def _constant(self, tensor: Value) -> np.ndarray | None:
        if isinstance(tensor, gs.Constant):
            return ir.values(tensor)
        node = tensor.inputs[0] if isinstance(tensor, gs.Tensor) and tensor.inputs else None
        if node is not None and node.op == "Constant":
            for key, value in node.attrs.items():
                if key == "value":
                    return ir.values(value)
                if key in ("value_int", "value_ints"):
                    return np.asarray(value, np.int64)
        return None

    def _SequenceConstruct(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        return list(values)

    def _SequenceEmpty(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        return []

    def _SequenceInsert(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        at = self._position(values, 2, len(values[0]))
        if at is None:
            return None
        made = list(values[0])
        made.insert(at, values[1])
        return made

    def _SequenceErase(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        at = self._position(values, 1, -1)
        if at is None:
            return None
        made = list(values[0])
        del made[at]
        return made

    def _SequenceAt(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        if isinstance(values[0], _Chunks):
            return self._chunk(values[0], values[1])
        at = self._position(values, 1, 0)
        return None if at is None else values[0][at]

    def _chunk(self, chunks: _Chunks, position: gs.Tensor) -> gs.Tensor | None:
        """Elements [p n, (p + 1) n) along the axis; p must not count from the end."""
        op, at = self.op, self._constant(position)
        if at is None or int(at.reshape(-1)[0]) < 0:
            return None
        size = op.Reshape(op.cast(chunks.size, np.int64), [1])
        first = op.Mul(size, int(at.reshape(-1)[0]))
        return op.Slice(chunks.x, first, op.Add(first, size), [chunks.axis])

    def _SequenceLength(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        return self.op.constant(np.asarray(len(values[0]), np.int64))

    def _ConcatFromSequence(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        axis, parts = node.attrs["axis"], values[0]
        if node.attrs.get("new_axis", 0):
            parts = [self.op.Unsqueeze(p, [axis]) for p in parts]
        return self.op.Concat(*parts, axis=axis)

    def _SplitToSequence(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        op, x, axis = self.op, values[0], node.attrs.get("axis", 0)
        dims = op.dims(x)
        n = dims[axis] if dims is not None else None
        if len(values) < 2 or values[1] is _ABSENT:
            if not isinstance(n, (int, np.integer)):
                return None
            lengths = [1] * int(n)
        else:
            split = self._constant(values[1])
            if split is None or (split.ndim == 0 and not isinstance(n, (int, np.integer))):
                return self._split_at_run_time(x, values[1], axis)
            if split.ndim == 0:
                size = int(split)
                lengths = [min(size, int(n) - k) for k in range(0, int(n), size)]  # type: ignore[arg-type]
            else:
                lengths = [int(k) for k in split]
        if not lengths:
            return []
        made = op.Split(x, lengths, axis=axis, outputs=len(lengths)) if len(lengths) > 1 else (x,)
        keep = node.attrs.get("keepdims", 1) or len(values) > 1
        return list(made) if keep else [op.Squeeze(part, [axis]) for part in made]

    def _split_at_run_time(self, x: gs.Tensor, split: gs.Tensor, axis: int) -> Value:
        """Lengths as an operand: as many parts as there are lengths; or chunks of one length."""
        dims = self.op.dims(split)
        if dims is None or len(dims) > 1:
            return None
        if not dims:
            return _Chunks(x, split, axis)
        count = dims[0]
        if not isinstance(count, (int, np.integer)) or count < 2:
            return [x] if count == 1 else None
        return list(self.op.Split(x, self.op.cast(split, np.int64), axis=axis, outputs=int(count)))

    def _Optional(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        return values[0] if values else _ABSENT

    def _OptionalGetElement(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        return None if values[0] is _ABSENT else values[0]

    def _OptionalHasElement(self, node: gs.Node, values: list[Value], local: Any) -> Value:
        return self.op.constant(np.asarray(bool(values) and values[0] is not _ABSENT))

    def _SequenceMap(self, node: gs.Node, values: list[Value], local: Any) -> list[Value]:
        """The body once for each element of the first sequence; other sequences keep step, tensors are passed whole."""
        body = node.attrs["body"]
        columns: list[list[Value]] = [[] for _ in body.outputs]
        for i in range(len(values[0])):
            scope: dict[str, Value] = dict(local)
            for tensor, value in zip(body.inputs, values, strict=True):
                scope[tensor.name] = value[i] if isinstance(value, list) else value
            for inner in body.nodes:
                for tensor in inner.outputs:
                    if tensor.name:
                        scope[tensor.name] = self.op.fresh(f"{tensor.name}.{i}")
            for inner in body.nodes:
                self.visit(inner, scope)
            for column, tensor in zip(columns, body.outputs, strict=True):
                column.append(self.look_up(tensor, scope))
        return columns


def _holds_tensor(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) or getattr(tensor, "type", "tensor_type") in ("tensor_type", None)
