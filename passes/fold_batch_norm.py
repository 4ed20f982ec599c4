"""BatchNormalization of running statistics, folded into the Conv before it, forwards and backwards.

With u = scale / sqrt(variance + epsilon), one number a channel m, a Conv and its BatchNormalization are one Conv:

    u_m ((W * x)_m + b_m - mean_m) + bias_m  =  (u W * x)_m + u_m (b_m - mean_m) + bias_m

and so are their cotangents.  With g that of the normalized output, G = dL/d(u W) = sum g x (the Conv's rule for its
weight, on g), and <.,.> the sum over all that belongs to a channel,

    dx = adjoint of (u W) on g      dW = u G      db = u sum(g)      dbias = sum(g)
    dscale_m = (<G_m, W_m> + (b_m - mean_m) sum(g)_m) / sqrt(variance_m + epsilon)

for  sum g_m ((W * x)_m + b_m - mean_m)  is linear in W.  That is why the weight has to be trained: then G is there.
Where the mean is many deviations large, the sum of its two terms loses digits, as any such sum does.  Nothing of the
Conv's own output is left to keep or to pass over, and what acts on weights instead of on maps is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.emit import Emitter
from zilc.graph import STATISTICS, Users, hand_over, is_standard
from zilc.rules import is_own
from zilc.vjp import table
from zilc.vjp.conv import image_cotangent, weight_cotangent
from zilc.vjp.norm import inverse_root, sum_to_channels
from zilc.vjp.table import Rule
from zilc.vjp.window import conv_window


@dataclass(frozen=True)
class Fold:
    """A Conv and the BatchNormalization that alone reads it, and the rules of both as one.

    Attributes:
        conv, norm: the nodes, as they stand.
        r: 1 / sqrt(variance + epsilon), [M].
        u: scale r, [M]; ``columns``: the same, to be multiplied with the weight.
        offset: b - mean, [M].
        weight, bias: of the Conv that is both: u W and u (b - mean) + bias.
    """

    conv: gs.Node
    norm: gs.Node
    r: gs.Tensor
    u: gs.Tensor
    columns: gs.Tensor
    offset: gs.Tensor
    weight: gs.Tensor
    bias: gs.Tensor

    @classmethod
    def of(cls, op: Emitter, conv: gs.Node, norm: gs.Node) -> Fold:
        """Emits what belongs to the forward part."""
        epsilon = float(table.attributes(norm, op.graph.opset)["epsilon"])
        weight, b = (*conv.inputs[1:], None)[:2]
        scale, bias, mean, variance = norm.inputs[1:5]
        with op.in_place_of(conv):
            r = inverse_root(op, variance, epsilon)
            u = op.Mul(scale, r)
            columns = op.Unsqueeze(u, _taps(op, weight))
            offset = op.Sub(b, mean) if b is not None and b.name else op.Neg(mean)
            folded = op.Add(op.Mul(offset, u), bias)
            return cls(conv, norm, r, u, columns, offset, op.Mul(weight, columns), folded)

    @property
    def rules(self) -> dict[int, Rule]:
        """By the nodes' ids."""
        conv = Rule("Conv", "", 1, (self._conv_x, self._conv_w, self._conv_b))
        norm = Rule("BatchNormalization", "", 1, (self._norm_x, self._norm_scale, self._norm_bias, None, None))
        return {id(self.conv): conv, id(self.norm): norm}

    def _conv_x(self, op: Emitter, g: gs.Tensor, y: Any, x: gs.Tensor, *_: Any, **attrs: Any) -> gs.Tensor:
        return image_cotangent(op, g, self.weight, x, conv_window(op, x, self.weight, **attrs))

    def _conv_w(self, op: Emitter, g: gs.Tensor, *_: Any, **attrs: Any) -> gs.Tensor:
        return op.Mul(self._gradient(op, g), self.columns)

    def _conv_b(self, op: Emitter, g: gs.Tensor, *_: Any, **attrs: Any) -> gs.Tensor:
        return op.Mul(self._norm_bias(op, g), self.u)

    def _norm_x(self, op: Emitter, g: gs.Tensor, *_: Any, **attrs: Any) -> gs.Tensor:
        return g  # the Conv's rules take it as it is: u is in the weight

    def _norm_scale(self, op: Emitter, g: gs.Tensor, *_: Any, **attrs: Any) -> gs.Tensor:
        weight = self.conv.inputs[1]
        along = op.ReduceSum(op.Mul(self._gradient(op, g), weight), _taps(op, weight), keepdims=0)
        return op.Mul(op.Add(along, op.Mul(self.offset, self._norm_bias(op, g))), self.r)

    def _norm_bias(self, op: Emitter, g: gs.Tensor, *_: Any, **attrs: Any) -> gs.Tensor:
        return sum_to_channels(op, g, len(_taps(op, self.conv.inputs[1])) + 1)

    def _gradient(self, op: Emitter, g: gs.Tensor) -> gs.Tensor:
        """G, chosen and emitted once for both that read it."""
        key, (x, weight) = (id(self.conv), g.name), self.conv.inputs[:2]
        if key not in op.shared:
            window = conv_window(op, x, weight, **table.attributes(self.conv, op.graph.opset))
            op.shared[key] = weight_cotangent(op, x, g, weight, window)
        made: gs.Tensor = op.shared[key]
        return made


def _taps(op: Emitter, weight: gs.Tensor) -> list[int]:
    """A weight's axes but the filters'."""
    rank = op.rank(weight)
    assert rank is not None, "static weights"
    return list(range(1, rank))


def fold_batch_norms(op: Emitter, graph: gs.Graph, trained: set[str]) -> list[Fold]:
    """Give each pair the weight and bias of its one Conv, and rules that use them (in place).

    The nodes of the forward part stay what they are until :func:`finish_folds`: edges of the dataflow name them.

    Args:
        op: of ``graph``; it takes the rules.
        trained: names of the trained parameters.

    Requires: nothing is emitted yet that reads what a Conv gives, but for losses.
    """
    users = Users(graph)
    folds: list[Fold] = []
    nodes: list[gs.Node] = []
    for conv in list(graph.nodes):
        norm = _norm_of(conv, users, trained, op)
        if norm is not None:
            first = len(graph.nodes)
            folds.append(Fold.of(op, conv, norm))
            op.rules |= folds[-1].rules
            nodes += graph.nodes[first:]
            del graph.nodes[first:]
        nodes.append(conv)
    graph.nodes = nodes
    return folds


def finish_folds(graph: gs.Graph, folds: list[Fold]) -> None:
    """The Conv of each pair becomes the one that is both, the BatchNormalization vanishes (in place)."""
    gone = {id(fold.norm) for fold in folds}
    for fold in folds:
        hand_over(fold.norm, fold.conv.outputs[0])
        fold.conv.inputs = [fold.conv.inputs[0], fold.weight, fold.bias]
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]


def _norm_of(conv: gs.Node, users: Users, trained: set[str], op: Emitter) -> gs.Node | None:
    """The BatchNormalization that folds into a node, if there is one."""
    if conv.op != "Conv" or not is_standard(conv) or conv.inputs[1].name not in trained:
        return None
    norm = users.only(conv.outputs[0])
    if norm is None or norm.op != "BatchNormalization" or not is_standard(norm):
        return None
    if norm.inputs[0] is not conv.outputs[0] or norm.attrs.get("training_mode", 0) or hasattr(norm, STATISTICS):
        return None
    leaves = [t for t in (*conv.inputs[1:], *norm.inputs[1:]) if t.name]
    if any(t.inputs or op.static(t) is None for t in leaves):
        return None
    # In half precision u W would be rounded once more than W, and the sums are of other things than the kernel's.
    kinds = {dtypes.np_dtype(t.dtype) for t in leaves}
    if len(kinds) != 1 or not kinds <= {np.dtype(np.float32), np.dtype(np.float64)}:
        return None
    # A rule of the user's stays in force.
    return norm if all(is_own(table.lookup(node, op.graph.opset)) for node in (conv, norm)) else None
