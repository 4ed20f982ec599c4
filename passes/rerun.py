"""The graph of a schedule in which nodes run again: barriers, and names for what is made a second time.

:mod:`zilc.passes.recompute` says why there are barriers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.emit import Emitter
from zilc.graph import INFERENCE, copy_node
from zilc.passes.liveness import ALIAS, Problem
from zilc.passes.simplify import drop_dead

#: Roles of the wave's nodes.
_WAVE = frozenset({"error", "update"})
#: A node of the wave that reads predictions alone is told to wait where it makes at least this part of the peak.
_MATTERS = 64

#: Metadata that says which vertex a node belongs to.
_PLACE = ("zilc.vertex", "zilc.level")


def rewrite(graph: gs.Graph, problem: Problem, schedule: Sequence[int]) -> None:
    """Bring the graph into the order of the schedule; what runs again has fresh names and barriers (in place)."""
    graph.nodes = Rewriting(graph, problem, schedule).nodes
    drop_dead(graph)  # a Reshape before a barrier, which reads past it


class Rewriting:
    """The nodes of a schedule, one after the other."""

    def __init__(self, graph: gs.Graph, problem: Problem, schedule: Sequence[int]) -> None:
        self.graph, self.problem, self.schedule = graph, problem, schedule
        self.op = Emitter.among(graph)
        #: The new order.
        self.nodes: list[gs.Node] = []
        #: What a tensor is called after its latest run, by its first name; and the reverse.
        self.latest: dict[str, gs.Tensor] = {}
        self.first: dict[str, str] = {}
        #: Outputs of this segment that wait for its barrier; and those of a Reshape that is a barrier itself, with what
        #: it reads.
        self.waiting: set[str] = set()
        self.reshaped: dict[str, gs.Tensor] = {}
        self.lonely = self._lonely()
        #: What each node reads, by its number, before its inputs are renamed.
        self.operands = [list(node.inputs) for node in problem.nodes]
        #: What is of another shape in inference form.
        self.marked = {t.name for node in problem.nodes if INFERENCE in node.metadata for t in node.outputs}
        #: Tensors that are made only when the wave has begun.
        self.late: set[str] = set()
        #: Bytes of a tensor that make a difference.
        self.matters = problem.run(schedule).peak // _MATTERS
        self.zero: gs.Tensor | None = None
        self.pace: tuple[gs.Tensor, gs.Node] | None = None
        for place, item in enumerate(schedule):
            if item < 0:
                if place == 0 or schedule[place - 1] >= 0:
                    self._open_segment()
                self._repeat(place, ~item)
            else:
                self._first(place, item)

    def _lonely(self) -> set[tuple[int, int]]:
        """(place, tensor): the only reader of one run's tensor, where the tensor had several readers before."""
        problem = self.problem
        run = [0] * len(problem.names)
        readers: dict[tuple[int, int], list[int]] = {}
        for place, item in enumerate(self.schedule):
            i = item if item >= 0 else ~item
            operands = [t.name for t in problem.nodes[i].inputs]
            for value in problem.reads[i]:
                times = max(1, operands.count(problem.names[value]))  # one that a subgraph captures is no operand
                readers.setdefault((run[value], value), []).extend([place] * times)
            for write in problem.writes[i]:
                run[write.value] = place
        found = set()
        for (_, value), places in readers.items():
            op = problem.nodes[problem.producer[value]].op
            # A Reshape is fused with no arithmetic; a Transpose is, however many readers it has.
            if len(places) == 1 < problem.readers[value] and op not in ALIAS and op != "Transpose":
                found.add((places[0], value))
        return found

    def _first(self, place: int, number: int) -> None:
        """A node's first run, on what its operands are called now."""
        node = self.problem.nodes[number]
        operands = [self._operand(place, node, t) for t in self.operands[number]]
        role = node.metadata.get("zilc.role")
        late = role == "loss" or any(t.name in self.late for t in operands)
        if not late and role in _WAVE and self.late and self._is_large(number):
            # It reads predictions alone, and a runtime might run it in the forward pass.
            with self._place(node):
                late = self._barrier(node.op, operands, self._paced())
        for k, (tensor, read) in enumerate(zip(self.operands[number], operands, strict=True)):
            if read is not tensor:
                node.inputs[k] = read
        self.nodes.append(node)
        if late:
            self.late.update(t.name for t in node.outputs)
        for tensor in node.outputs if late or not self.late else ():
            if tensor.name in self.problem.number and self._has_elements(tensor) and self._same_shape(tensor):
                self.pace = tensor, node

    def _is_large(self, number: int) -> bool:
        """Whether a node that is run too early would hold memory that matters; a Transpose is fused as a rule."""
        made = sum(write.size for write in self.problem.writes[number])
        return made >= self.matters and self.problem.nodes[number].op != "Transpose"

    def _paced(self) -> gs.Tensor:
        """A zero that is known once the wave has come as far as this."""
        assert self.pace is not None
        return self._zero(self.pace[0])

    def _operand(self, place: int, node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
        """What a node reads for ``tensor``, behind a Reshape where it must not be fused with it."""
        read = self.latest.get(tensor.name, tensor)
        value = self.problem.number.get(tensor.name, -1)
        if (place, value) not in self.lonely or node.op in ALIAS or not self._same_shape(tensor):
            return read
        if self.zero is None:
            # Before the first segment there is nothing to wait for; data will do.
            start = next((t for t in self.graph.inputs if self._has_elements(t)), None)
            if start is None:
                return read
            with self._place(node):
                self.zero = self._zero(start)
        with self._place(node):
            return self._behind(read, self.zero)

    def _place(self, node: gs.Node):
        """Emitted nodes belong to the vertex of ``node``."""
        facts = {k.removeprefix("zilc."): v for k, v in node.metadata.items() if k in (*_PLACE, "zilc.step")}
        return self.op.place(f"{node.name or node.op}.recompute", **{**facts, "role": "recompute"})

    def _has_elements(self, tensor: gs.Tensor) -> bool:
        dims = self.problem.dims(tensor)
        return bool(dims) and math.prod(dims or ()) > 0 and dtypes.np_dtype(tensor.dtype) is not None

    def _same_shape(self, tensor: gs.Tensor) -> bool:
        """Whether it may be reshaped to what it is: its shape is known, and no other one in inference form."""
        first = self.first.get(tensor.name, tensor.name)
        return self.problem.dims(tensor) is not None and first not in self.marked

    def _take(self) -> None:
        """What was emitted comes next."""
        self.nodes += self.op.graph.nodes
        self.op.graph.nodes = []

    def _zero(self, tensor: gs.Tensor) -> gs.Tensor:
        """A zero, int64 [1], that is known only once ``tensor`` is: the least of 0 and a number that is 0 or 1."""
        op, dims = self.op, self.problem.dims(tensor)
        assert dims is not None
        first = op.GatherND(tensor, op.constant(np.zeros((1, len(dims)), np.int64)))
        # To a whole number by way of a truth value: what NaN becomes else is for each runtime to say.
        number = op.Cast(op.Cast(first, to=onnx.TensorProto.BOOL), to=onnx.TensorProto.INT64)
        zero = op.Min(number, op.constant(np.zeros(1, np.int64)))
        self._take()
        return zero

    def _behind(self, tensor: gs.Tensor, zero: gs.Tensor, shape: gs.Tensor | None = None) -> gs.Tensor:
        """The tensor, or in the shape of another one, once ``zero`` is known; nothing is copied."""
        dims = self.problem.dims(tensor if shape is None else shape)
        assert dims is not None
        while tensor.inputs and tensor.inputs[0].op in ALIAS:
            # onnxruntime makes one Reshape of two, of the second's shape if it is known, and the zero would be gone.
            tensor = tensor.inputs[0].inputs[0]
        made = self.op.Reshape(tensor, self.op.Add(self.op.constant(np.asarray(dims, np.int64)), zero))
        made.shape, made.dtype = list(dims), tensor.dtype
        self._take()
        return made

    def _open_segment(self) -> None:
        self.waiting, self.reshaped = set(), {}
        if self.pace is not None:
            with self._place(self.pace[1]):
                self.zero = self._paced()

    def _repeat(self, place: int, number: int) -> None:
        """A node's further run."""
        node = self.problem.nodes[number]
        operands = [self._operand(place, node, t) for t in self.operands[number]]
        made = [self._fresh(t) for t in node.outputs]
        if not any(t.name in self.waiting for t in operands) and self.zero is not None:
            entry = operands[0]
            if node.op in ALIAS and self.problem.dims(node.outputs[0]) is not None:
                entry = self.reshaped.get(entry.name, entry)
                with self._place(node):
                    waits = self._behind(entry, self.zero, node.outputs[0])
                self.reshaped[waits.name] = entry
                self.latest[node.outputs[0].name] = waits
                self._ran(waits)
                return
            with self._place(node):
                self._barrier(node.op, operands, self.zero)
        again = copy_node(node, operands, made)
        again.name = self.op.fresh(f"{node.name or node.op}.recompute")
        again.metadata = {**again.metadata, "zilc.role": "recompute"}
        self.nodes.append(again)
        for old, new in zip(node.outputs, made, strict=True):
            if old.name:
                self.waiting.add(new.name)
                self.first[new.name] = old.name
                self._ran(new)
            if old.name in self.problem.number:  # an output of the graph stays anyway
                self.latest[old.name] = new

    def _ran(self, tensor: gs.Tensor) -> None:
        """What runs again once the wave has begun comes late."""
        if self.late:
            self.late.add(tensor.name)

    def _fresh(self, tensor: gs.Tensor) -> gs.Tensor:
        if not tensor.name:
            return gs.Variable.empty()
        known = self.problem.dims(tensor)
        shape = tensor.shape if known is None else list(known)
        return gs.Variable(self.op.fresh(f"{tensor.name}.recompute"), tensor.dtype, shape)

    def _barrier(self, op: str, operands: list[gs.Tensor], zero: gs.Tensor) -> bool:
        """Let one operand wait for ``zero`` (in place); returns whether one does, or does already.

        A parameter if there is one: onnxruntime puts a Reshape of its own before the first factor of a product whose
        bias it fuses, and makes one of two that follow each other; before a parameter it puts none.
        """
        found = [
            k for k, t in enumerate(operands) if isinstance(t, gs.Variable) and t.name and self._same_shape(t)
        ]  # fmt: skip
        parameters = [k for k in found if not operands[k].inputs and self.problem.dims(operands[k])]
        if not parameters and any(t.name in self.reshaped for t in operands):
            return True
        chosen = next(iter([*parameters, *(k for k in found if operands[k].inputs), *found]), None)
        if chosen is not None:
            operands[chosen] = self._behind(operands[chosen], zero)
        elif op == "Expand" and self._has_elements(operands[1]):  # of a constant: its shape can wait
            operands[1] = self.op.Add(operands[1], zero)
            self._take()
        else:
            return False
        return True
