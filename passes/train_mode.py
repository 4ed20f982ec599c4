"""From inference form to training form: BatchNormalization takes batch statistics, Dropout draws masks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes, ir, splitmix
from zilc.emit import Emitter
from zilc.errors import ModelError, describe_vertex
from zilc.graph import FROZEN, INFERENCE, STATISTICS, Rebuild, every_node, fresh_name
from zilc.passes import contracts
from zilc.vjp import table
from zilc.vjp.norm import batch_statistics

_DEFAULT = (None, "", "ai.onnx")
_TURNED = ("BatchNormalization", "Dropout")
#: What the default of Dropout's ratio is.
_RATIO = 0.5
#: Ratios are compared in steps of 2^-32.
_BITS = 32


@dataclass
class TrainMode:
    """What was turned, and what a training graph must feed back for it.

    Attributes:
        carried: running statistics, and the tensor that holds what follows: {name: next}.
        batch_normalizations, dropouts: names of the vertices that were turned.
        seed, step: inputs that the masks depend on, int64 []; None where nothing is random.
        split: running statistics that share a tensor with something else in the file, under names of their own:
            {name: tensor of the file}.
    """

    carried: dict[str, str] = field(default_factory=dict)
    batch_normalizations: list[str] = field(default_factory=list)
    dropouts: list[str] = field(default_factory=list)
    seed: str | None = None
    step: str | None = None
    split: dict[str, str] = field(default_factory=dict)

    @property
    def turned(self) -> int:
        return len(self.batch_normalizations) + len(self.dropouts)


def train_mode(graph: gs.Graph) -> tuple[gs.Graph, TrainMode]:
    """A new graph whose BatchNormalization and Dropout are in training form, and what it feeds back.

    Requires: acyclic(graph); opset 15 or newer, constants lifted.
    Ensures:  acyclic(result); one level structure for both forms: each turned vertex is one vertex as before.

    Before:  x, scale, bias, mean, var -> BatchNormalization -> y
             x, ratio -> Dropout -> y, mask
    After:   x, scale, bias, mean, var -> BatchNormalization(training_mode = 1) -> y
             x -> ReduceMean -> m;  mean momentum + m (1 - momentum) = next of mean;  likewise var    (frozen)
             seed, step, vertex, element -> SplitMix64 -> >= ratio -> mask;  Where(mask, 1/(1 - ratio), 0)    (frozen)
             x, that -> Mul -> y

    What is frozen carries no derivative.  The derivative of BatchNormalization passes through its batch statistics all
    the same: its rule differentiates them.  Frozen nodes are held at their forward values through all inference steps,
    so that a mask is drawn, and running statistics move, once an update (ZIL.md, section 6).

    The running update is that of ONNX's operator, running momentum + batch (1 - momentum), with the biased variance
    (divided by n).  PyTorch's layer divides by n - 1 there: its running variance takes n/(n - 1) of the same.

    A tensor of running statistics belongs to one layer.  Vertices that share scale, bias, mean and var are one layer,
    applied several times: each application moves the statistics on from where the one before left them.  Otherwise a
    shared tensor is an accident of exporters, which merge equal constants: each layer then gets statistics of its own,
    under the names Y.running_mean and Y.running_var, where Y is the vertex's output.

    Raises:
        ModelError: a vertex inside a control-flow body, running statistics that are no initializers, a Dropout ratio
            outside [0, 1], or a BatchNormalization of unknown rank.
    """
    contracts.require(contracts.acyclic(graph), "acyclic")
    _refuse_inner(graph)
    state = TrainMode()
    wanted = [node for node in graph.nodes if node.op in _TURNED and node.domain in _DEFAULT]
    if not wanted:
        return graph, state
    turn = _Turn(graph, state)
    for node in graph.nodes:
        if node.domain in _DEFAULT and node.op == "BatchNormalization":
            turn.batch_normalization(node)
        elif node.domain in _DEFAULT and node.op == "Dropout":
            turn.dropout(node)
        else:
            turn.rebuild.add(node)
    result = turn.rebuild.finish()
    result.inputs += turn.inputs
    contracts.ensure(contracts.acyclic(result), "acyclic")
    return result, state


def _refuse_inner(graph: gs.Graph) -> None:
    for node in graph.nodes:
        for inner in (n for body in node.subgraphs() for n in every_node(body)):
            if inner.op in _TURNED and inner.domain in _DEFAULT:
                where = describe_vertex(node.name or node.outputs[0].name, node.op)
                raise ModelError(
                    f"holds {describe_vertex(inner.name or inner.outputs[0].name, inner.op)} in its body, "
                    "expected training-mode operators outside control flow",
                    where=where,
                    hint="Fix its course, so that it is written out (--dim NAME=N settles a length), or use "
                    "--mode eval.",
                )


class _Turn:
    """The graph under construction."""

    def __init__(self, graph: gs.Graph, state: TrainMode) -> None:
        self.graph, self.state = graph, state
        self.rebuild = Rebuild(graph)
        self.op = Emitter(gs.Graph(nodes=self.rebuild.nodes, opset=graph.opset), Emitter(graph).names)
        self.inputs: list[gs.Variable] = []
        self._layers = _layers(graph)
        self._owners = _owners(graph, self._layers)
        self._key: gs.Tensor | None = None

    def _freeze(self, first: int) -> None:
        """What was emitted since is held at its forward value."""
        for node in self.rebuild.nodes[first:]:
            setattr(node, FROZEN, True)

    # -- BatchNormalization --

    def batch_normalization(self, node: gs.Node) -> None:
        op, name = self.op, _name(node)
        attrs = table.attributes(node, self.graph.opset)
        x, scale, bias, *running = (self.rebuild.tensor(t) for t in node.inputs)
        label = describe_vertex(name, node.op)
        if x.shape is None:
            hint = "Export the model with shapes."
            raise ModelError("the rank of its input is unknown", where=label, hint=hint)
        for tensor in running:
            if not isinstance(tensor, gs.Constant):
                raise ModelError(
                    f"its running statistics '{tensor.name}' are no initializer, so their next values have no place",
                    where=label,
                    hint="Export the model with running statistics as initializers, or use --mode eval.",
                )
        first = len(self.rebuild.nodes)
        op.forget()  # a node of its own for each vertex: in inference form they differ
        with op.place(f"{name}.batch", vertex=name):
            own = batch_statistics(op, x, float(attrs["epsilon"]))
            rank = len(x.shape)
            axes = [k for k in range(rank) if k != 1] if rank > 1 else []  # a vector is one channel
            batch = [own.mean, own.variance]
            leaves = []
            for k, (tensor, statistic) in enumerate(zip(running, batch, strict=True)):
                leaf = self._running(node, k, tensor)
                leaves.append(leaf)
                self._follow(leaf, statistic, axes, float(attrs["momentum"]), _output(node, k + 1))
                maker = statistic.inputs[0]
                facts = {"input": leaf.name, "axes": axes, "dtype": dtypes.onnx_dtype(statistic.dtype)}
                maker.metadata = {**maker.metadata, INFERENCE: json.dumps(facts)}
        self._freeze(first)
        for made in self.rebuild.nodes[first:]:
            op.dims(made.outputs[0])
        turned = self.rebuild.add(node, [x, scale, bias, *leaves])
        turned.attrs = {**node.attrs, "training_mode": 1}
        turned.outputs = turned.outputs[:1]
        setattr(turned, STATISTICS, (own.centred.name, own.r.name))
        self.state.batch_normalizations.append(name)

    def _running(self, node: gs.Node, which: int, tensor: gs.Constant) -> gs.Constant:
        """The initializer that holds a layer's running mean (0) or variance (1)."""
        if self._owners.get(tensor.name) == (self._layers[id(node)], which):
            return tensor
        name = f"{node.outputs[0].name}.running_{('mean', 'var')[which]}"
        values = ir.copy_values(tensor._values)
        made = gs.Constant(fresh_name(name, self.op.names), values, data_location=tensor.data_location)
        self.rebuild.tensors[made.name] = made
        self.state.split[made.name] = tensor.name
        return made

    def _follow(
        self, leaf: gs.Constant, batch: gs.Tensor, axes: list[int], momentum: float, wanted: gs.Tensor | None
    ) -> None:
        """running momentum + batch (1 - momentum), from where an earlier application of the layer left it."""
        op, state = self.op, self.state
        before = self.rebuild.tensors[state.carried[leaf.name]] if leaf.name in state.carried else leaf
        dtype, kept = dtypes.np_dtype(leaf.dtype), op.dtype(batch)
        assert dtype is not None
        statistic = op.Squeeze(batch, axes) if axes else batch
        moved = op.Add(op.Mul(op.cast(before, kept), momentum), op.Mul(statistic, 1.0 - momentum))
        following = op.cast(moved, dtype)
        if wanted is not None:
            following.name = wanted.name
        following.shape = list(leaf.shape)
        self.rebuild.tensors[following.name] = following
        state.carried[leaf.name] = following.name

    # -- Dropout --

    def dropout(self, node: gs.Node) -> None:
        op, name = self.op, _name(node)
        ratio = self.rebuild.tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1].name else None
        known = _known_ratio(node, ratio, describe_vertex(name, node.op))
        if known == 0.0:
            # Nothing is dropped in training either: it stays in inference form.
            self.rebuild.add(node, [self.rebuild.tensor(node.inputs[0])])
            return
        x = self.rebuild.tensor(node.inputs[0])
        dtype = op.dtype(x)
        first = len(self.rebuild.nodes)
        with op.place(f"{name}.mask", vertex=name):
            shape = op.shape_of(x)
            if known is not None and known >= 1.0:
                keep = op.Expand(op.constant(np.asarray([False])), shape)
            else:
                key = splitmix.fold(op, self._base(), splitmix.constant_of(node.outputs[0].name))
                drawn = splitmix.words(op, key, op.count(x, np.int64))
                keep = op.Reshape(op.GreaterOrEqual(drawn, self._threshold(ratio, known)), shape)
                if known is None:
                    keep = op.And(keep, op.Less(self._double(ratio), 1.0))
            keep = self._named(keep, _output(node, 1), x)
            factor = op.Where(keep, self._factor(ratio, known, dtype), op.constant(np.zeros((), dtype)))
            factor.shape = list(x.shape) if x.shape is not None else None
            factor.inputs[0].metadata = {
                **factor.inputs[0].metadata, INFERENCE: json.dumps({"value": 1, "dtype": dtypes.onnx_dtype(dtype)})
            }  # fmt: skip
        self._freeze(first)
        made = gs.Node("Mul", name=node.name, inputs=[x, factor], outputs=[self.rebuild.tensor(node.outputs[0])])
        made.metadata, made.doc_string = dict(getattr(node, "metadata", {})), getattr(node, "doc_string", "")
        self.rebuild.nodes.append(made)
        self.state.dropouts.append(name)

    def _base(self) -> gs.Tensor:
        """The part of the key that all vertices share; seed and step become inputs with the first mask."""
        if self._key is None:
            op, names = self.op, []
            for name in ("seed", "step"):
                taken = op.fresh(name if name not in op.names else f"zilc.{name}")
                self.inputs.append(gs.Variable(taken, np.dtype(np.int64), []))
                self.rebuild.tensors[taken] = self.inputs[-1]
                names.append(taken)
            self.state.seed, self.state.step = names
            with op.place("random", vertex="random"):
                self._key = splitmix.fold(op, splitmix.fold(op, None, self.inputs[0]), self.inputs[1])
        return self._key

    def _double(self, ratio: gs.Tensor | None) -> gs.Tensor:
        assert ratio is not None
        return self.op.Reshape(self.op.cast(ratio, np.float64), self.op.constant(np.zeros(0, np.int64)))

    def _threshold(self, ratio: gs.Tensor | None, known: float | None) -> gs.Tensor:
        """floor(ratio 2^32) 2^32, as uint64: words from here on are kept."""
        op = self.op
        if known is not None:
            return op.constant(np.asarray(int(known * 2.0**_BITS) << _BITS, np.uint64))
        steps = op.cast(op.Mul(self._double(ratio), 2.0**_BITS), np.int64)
        return op.BitShift(op.cast(steps, np.uint64), op.constant(np.asarray(_BITS, np.uint64)), direction="LEFT")

    def _factor(self, ratio: gs.Tensor | None, known: float | None, dtype: np.dtype) -> gs.Tensor:
        """1 / (1 - ratio); 0 where all is dropped."""
        op = self.op
        if known is not None:
            return op.constant(np.asarray(1.0 / (1.0 - known) if known < 1.0 else 0.0, dtype))
        kept = op.Sub(op.constant(np.ones((), np.float64)), self._double(ratio))
        return op.cast(op.Where(op.Greater(kept, 0.0), op.Reciprocal(kept), 0.0), dtype)

    def _named(self, keep: gs.Variable, wanted: gs.Tensor | None, x: gs.Tensor) -> gs.Variable:
        """The mask, bool, under the name that the file gave it; in inference form everything is kept."""
        if wanted is not None:
            keep.name = wanted.name
            self.rebuild.tensors[keep.name] = keep
            facts = {"value": 1, "dtype": dtypes.onnx_dtype(np.dtype(bool)), "shape_of": x.name}
            keep.inputs[0].metadata = {**keep.inputs[0].metadata, INFERENCE: json.dumps(facts)}
        keep.shape = list(x.shape) if x.shape is not None else None
        return keep


def _name(node: gs.Node) -> str:
    return node.name or node.outputs[0].name


def _output(node: gs.Node, k: int) -> gs.Tensor | None:
    """An optional output that the file asks for."""
    return node.outputs[k] if k < len(node.outputs) and node.outputs[k].name else None


def _known_ratio(node: gs.Node, ratio: gs.Tensor | None, label: str) -> float | None:
    """The ratio, None where it is an input of the model.

    Raises:
        ModelError: it is outside [0, 1].
    """
    if ratio is None:
        return float(node.attrs.get("ratio", _RATIO))
    if not isinstance(ratio, gs.Constant):
        return None
    known = float(np.asarray(ir.values(ratio), np.float64).reshape(-1)[0])
    if not 0.0 <= known <= 1.0:
        raise ModelError(f"ratio {known:g}, expected one from 0 to 1", where=label, hint="Mend the model's ratio.")
    return known


def _layers(graph: gs.Graph) -> dict[int, tuple[str, ...]]:
    """Which layer each BatchNormalization applies, by the id of its node: its four tensors."""
    found = {}
    for node in graph.nodes:
        if node.op == "BatchNormalization" and node.domain in _DEFAULT:
            tensors = tuple(t.name for t in node.inputs[1:5])
            # A layer whose statistics are its scale or bias, or one another, was merged with something.
            found[id(node)] = tensors if len(set(tensors)) == len(tensors) else (*tensors, node.outputs[0].name)
    return found


def _owners(graph: gs.Graph, layers: Mapping[int, tuple[str, ...]]) -> dict[str, tuple[tuple[str, ...], int] | None]:
    """The one layer and place, mean (0) or variance (1), that reads a tensor; None where anything else does too."""
    owners: dict[str, tuple[tuple[str, ...], int] | None] = {t.name: None for t in graph.outputs}
    for node in every_node(graph):
        for k, tensor in enumerate(node.inputs):
            layer = layers.get(id(node))
            owner = (layer, k - 3) if layer is not None and k in (3, 4) else None
            owners[tensor.name] = owner if owners.get(tensor.name, owner) == owner else None
    return owners
