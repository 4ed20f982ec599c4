"""What of a training graph is alive when: memory and work of a schedule of its nodes, in numbers.

:mod:`zilc.passes.recompute` says what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes, ir
from zilc.graph import captured

#: Roles of nodes that may run again.
_AGAIN = frozenset({"forward", "identity", "loss"})
#: The output is the first input under another name and shape.
ALIAS = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
#: Each run draws anew.
_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
#: So many floating-point operations take about as long as moving one byte.
_FLOPS_A_BYTE = 10.0
#: Operations an element, where it is not one or two.
_COSTLY = {
    **dict.fromkeys(("Exp", "Tanh", "Sigmoid", "Erf", "Gelu", "Softplus", "Log", "Pow", "Sin", "Cos", "Mish"), 20.0),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization", "GroupNormalization", "RMSNormalization"), 30.0),
}  # fmt: skip


class Write(NamedTuple):
    """A tensor that a node makes: its number, its bytes, and the tensor whose memory it shares (-1: its own)."""

    value: int
    size: int
    source: int


@dataclass
class Life:
    """A tensor's memory from one run of its producer on.

    Attributes:
        start, last: places in the schedule.
        reads: (place, tensor): through which name it is read where.
    """

    start: int
    last: int
    size: int
    reads: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Simulated:
    """A schedule's memory.

    Attributes:
        alive: bytes at each place, int64.
        lives: every stretch of memory, where asked for.
        runs: by tensor, (place, number of the life) of each run that made it, where asked for.
    """

    alive: np.ndarray
    lives: list[Life] = field(default_factory=list)
    runs: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return int(self.alive.max(initial=0))

    def over(self, budget: int) -> float:
        """Bytes over budget, summed over the places."""
        return float(np.maximum(self.alive - budget, 0).sum())


class Problem:
    """The graph in numbers: what each node reads and makes, and what it costs to run it again.

    A schedule is a list of nodes by number; one that runs again stands there as ``~number``.
    """

    def __init__(self, graph: gs.Graph, shapes: Mapping[str, Sequence[int | str | None] | None]) -> None:
        self.nodes = list(graph.nodes)
        self.shapes = shapes
        self.names: list[str] = []
        self.number: dict[str, int] = {}
        self.dtypes: dict[str, np.dtype | None] = {}
        self.reads: list[list[int]] = []
        self.writes: list[list[Write]] = []
        self.producer: list[int] = []
        outputs = {t.name for t in graph.outputs}
        pinned = {t.name for node in self.nodes if node.attrs for t in captured(node)}
        constant: set[str] = set()
        readers: dict[str, int] = dict.fromkeys(outputs, 1)
        for i, node in enumerate(self.nodes):
            inner = captured(node) if node.attrs else []
            operands = [t for t in (*node.inputs, *inner) if t.name]
            for tensor in operands:
                readers[tensor.name] = readers.get(tensor.name, 0) + 1
            made = [t for t in node.outputs if t.name]
            fixed = all(isinstance(t, gs.Constant) or t.name in constant for t in operands)
            if fixed and node.op not in _RANDOM and node.op != "Expand":
                # Runtimes compute it once, when they load the graph; but onnxruntime leaves what grows by it.
                constant.update(t.name for t in made)
            self.reads.append(list(dict.fromkeys(self.number[t.name] for t in operands if t.name in self.number)))
            writes = []
            for tensor in made:
                if tensor.name in outputs or tensor.name in constant:
                    continue
                source = -1
                if node.op in ALIAS and tensor is node.outputs[0]:
                    first = node.inputs[0].name
                    if first not in self.number:
                        continue  # another name for an input, an output or a constant
                    source = self.number[first]
                value = len(self.names)
                self.number[tensor.name] = value
                self.names.append(tensor.name)
                self.producer.append(i)
                writes.append(Write(value, 0 if source >= 0 else self._bytes(tensor), source))
            self.writes.append(writes)
        self.readers = [readers.get(name, 0) for name in self.names]
        self.again = [self._may_run_again(node, pinned) for node in self.nodes]
        #: Nodes whose first run may be left out where nobody reads it: they make no output of the graph.
        self.may_go = [
            self.again[i] and bool(self.writes[i]) and all(t.name in self.number for t in node.outputs if t.name)
            for i, node in enumerate(self.nodes)
        ]
        self.cost = [self._cost(node) for node in self.nodes]

    def _bytes(self, tensor: gs.Tensor) -> int:
        """0 where the size is not known before the graph runs."""
        dims = self.dims(tensor)
        dtype = dtypes.np_dtype(tensor.dtype)
        return 0 if dims is None or dtype is None else math.prod(dims) * dtype.itemsize

    def dims(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        """Shape in numbers, if it is known."""
        known = self.shapes.get(tensor.name)
        shape = known if known is not None else tensor.shape
        if shape is None or not all(isinstance(n, (int, np.integer)) for n in shape):
            return None
        return tuple(int(n) for n in shape)  # type: ignore[arg-type]

    def _may_run_again(self, node: gs.Node, pinned: set[str]) -> bool:
        return (
            node.metadata.get("zilc.role") in _AGAIN
            and node.op not in _RANDOM
            and not ir.subgraphs(node)
            and not any(t.name in pinned for t in node.outputs)  # a subgraph reads it under its one name
        )

    def _cost(self, node: gs.Node) -> float:
        """Work of a node: operations, in bytes moved in the same time, and bytes."""
        if node.op in ALIAS:
            return 0.0
        sizes = [self.dims(t) for t in node.outputs if t.name]
        elements = float(sum(math.prod(d) for d in sizes if d is not None))
        operands = [self.dims(t) if t.name else None for t in node.inputs]
        first = operands[0] if operands else None
        second = operands[1] if len(operands) > 1 else None
        flops = elements * _COSTLY.get(node.op, 2.0)
        if node.op in ("MatMul", "Gemm") and first:
            flops = 2 * elements * first[-2 if node.attrs.get("transA") and len(first) > 1 else -1]
        elif node.op == "Conv" and second:
            flops = 2 * elements * math.prod(second[1:])
        elif node.op == "ConvTranspose" and first and second:
            flops = 2 * float(math.prod(first)) * math.prod(second[1:])
        elif node.op in ("LSTM", "GRU", "RNN") and first and second:
            flops = 2 * float(math.prod(first)) * second[1] * 2
        elif node.op == "Einsum":
            flops = 2 * max([elements, *(float(math.prod(d)) for d in operands if d)]) * 64
        moved = sum(self._bytes(t) for t in (*node.inputs, *node.outputs) if t.name)
        return flops / _FLOPS_A_BYTE + moved

    def run(self, schedule: Sequence[int], *, closely: bool = False) -> Simulated:
        """Simulate a schedule.

        Args:
            closely: also every stretch of memory with its reads.
        """
        current = [-1] * len(self.names)
        start: list[int] = []
        last: list[int] = []
        size: list[int] = []
        reads: list[list[tuple[int, int]]] = []
        runs: list[list[tuple[int, int]]] = [[] for _ in self.names] if closely else []
        for place, item in enumerate(schedule):
            i = item if item >= 0 else ~item
            for value in self.reads[i]:
                life = current[value]
                last[life] = place
                if closely:
                    reads[life].append((place, value))
            for value, count, source in self.writes[i]:
                if source >= 0:
                    life = current[source]
                else:
                    life = len(start)
                    start.append(place)
                    last.append(place)
                    size.append(count)
                    if closely:
                        reads.append([])
                current[value] = life
                if closely:
                    runs[value].append((place, life))
        change = np.zeros(len(schedule) + 1, np.int64)
        if start:
            np.add.at(change, np.asarray(start), np.asarray(size, np.int64))
            np.subtract.at(change, np.asarray(last) + 1, np.asarray(size, np.int64))
        found = Simulated(np.cumsum(change[:-1]))
        if closely:
            found.lives = [Life(*entry) for entry in zip(start, last, size, reads, strict=True)]
            found.runs = runs
        return found

    def work(self, schedule: Sequence[int]) -> float:
        """Cost of all runs."""
        return sum(self.cost[item if item >= 0 else ~item] for item in schedule)

    def made(self, schedule: Sequence[int]) -> int:
        """Bytes of all tensors that are made."""
        return sum(w.size for item in schedule for w in self.writes[item if item >= 0 else ~item] if w.source < 0)

    def without_dead(self, schedule: list[int]) -> list[int]:
        """The schedule without runs that nobody reads: a first one neither, which makes of the next one the first."""
        needed = [False] * len(self.names)
        kept = []
        for item in reversed(schedule):
            i = item if item >= 0 else ~item
            if (item < 0 or self.may_go[i]) and not any(needed[w.value] for w in self.writes[i]):
                continue
            for write in self.writes[i]:
                needed[write.value] = False
            for value in self.reads[i]:
                needed[value] = True
            kept.append(item)
        kept.reverse()
        return kept
