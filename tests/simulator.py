"""A NumPy simulator of Z-IL on computational graphs, written from the equations; it shares no code with zilc.

Models are read with ``onnx`` alone.  Active part, levels, identity vertices, the VJP of every operator, the
dynamics of inference and plain reverse mode are all done here a second time, slowly and literally.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Arrays = dict[str, np.ndarray]
#: VJP of operand i at operands xs, cotangents g and predictions y (tuples, one entry an output).
Formula = Callable[..., np.ndarray]

_FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE}


# --- operators: forward, and the VJP of each operand -----------------------------------------------


def _unbroadcast(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum ``g`` down to ``shape``, which was broadcast to it."""
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(k for k, n in enumerate(shape) if n == 1), keepdims=True).reshape(shape)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _axes(x: np.ndarray, rest: Sequence[np.ndarray], attrs: Mapping[str, Any]) -> tuple[int, ...]:
    """The axes a reduction sums over; they are its second operand."""
    if rest and rest[0].size:
        return tuple(int(a) % x.ndim for a in rest[0])
    return () if attrs.get("noop_with_empty_axes", 0) else tuple(range(x.ndim))


def _reduce(mean: bool) -> Callable[..., np.ndarray]:
    def forward(xs: Sequence[np.ndarray], a: Mapping[str, Any]) -> np.ndarray:
        x, axes = xs[0], _axes(xs[0], xs[1:], a)
        count = int(np.prod([x.shape[k] for k in axes])) if mean else 1
        return (x.sum(axis=axes, keepdims=bool(a.get("keepdims", 1))) / x.dtype.type(count)).astype(x.dtype)

    return forward


def _reduce_vjp(mean: bool) -> Callable[..., np.ndarray]:
    def backward(i: int, g: Any, y: Any, xs: Sequence[np.ndarray], a: Mapping[str, Any]) -> np.ndarray:
        x, axes = xs[0], _axes(xs[0], xs[1:], a)
        kept = [1 if k in axes else n for k, n in enumerate(x.shape)]
        count = int(np.prod([x.shape[k] for k in axes])) if mean else 1
        return np.broadcast_to(g[0].reshape(kept) / x.dtype.type(count), x.shape).astype(x.dtype)

    return backward


def _matmul_vjp(i: int, g: Any, y: Any, xs: Sequence[np.ndarray], a: Mapping[str, Any]) -> np.ndarray:
    left, right = xs[0], xs[1]
    two_left = left[None, :] if left.ndim == 1 else left
    two_right = right[:, None] if right.ndim == 1 else right
    full = g[0]
    if left.ndim == 1:
        full = np.expand_dims(full, -1 if right.ndim == 1 else -2)
    if right.ndim == 1:
        full = np.expand_dims(full, -1)
    if i == 0:
        return _unbroadcast(full @ np.swapaxes(two_right, -1, -2), two_left.shape).reshape(left.shape)
    return _unbroadcast(np.swapaxes(two_left, -1, -2) @ full, two_right.shape).reshape(right.shape)


def _gemm(xs: Sequence[np.ndarray], a: Mapping[str, Any]) -> np.ndarray:
    left = xs[0].T if a.get("transA", 0) else xs[0]
    right = xs[1].T if a.get("transB", 0) else xs[1]
    out = left.dtype.type(a.get("alpha", 1.0)) * (left @ right)
    return out + left.dtype.type(a.get("beta", 1.0)) * xs[2] if len(xs) > 2 else out


def _gemm_vjp(i: int, g: Any, y: Any, xs: Sequence[np.ndarray], a: Mapping[str, Any]) -> np.ndarray:
    if i == 2:
        return _unbroadcast(g[0].dtype.type(a.get("beta", 1.0)) * g[0], xs[2].shape)
    left = xs[0].T if a.get("transA", 0) else xs[0]
    right = xs[1].T if a.get("transB", 0) else xs[1]
    scaled = g[0].dtype.type(a.get("alpha", 1.0)) * g[0]
    d = scaled @ right.T if i == 0 else left.T @ scaled
    return d.T if a.get("transA" if i == 0 else "transB", 0) else d


def _parts(xs: Sequence[np.ndarray], a: Mapping[str, Any], outputs: int) -> list[int]:
    """Sizes of the pieces of a Split."""
    if len(xs) > 1:
        return [int(n) for n in xs[1]]
    total = xs[0].shape[a.get("axis", 0)]
    size = -(-total // outputs)
    return [size] * (outputs - 1) + [total - size * (outputs - 1)]


def _slices(x: np.ndarray, rest: Sequence[np.ndarray]) -> tuple[slice, ...]:
    """Python slices for starts, ends, axes, steps; a negative step that runs off the front ends at None."""
    starts, ends = rest[0], rest[1]
    axes = rest[2] if len(rest) > 2 else np.arange(len(starts))
    steps = rest[3] if len(rest) > 3 else np.ones(len(starts), np.int64)
    cut = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        n = x.shape[axis]
        stop: int | None = int(end)
        if step < 0 and end < -n:
            stop = None
        cut[int(axis)] = slice(int(start), stop, int(step))
    return tuple(cut)


def _slice_vjp(i: int, g: Any, y: Any, xs: Sequence[np.ndarray], a: Mapping[str, Any]) -> np.ndarray:
    d = np.zeros_like(xs[0])
    d[_slices(xs[0], xs[1:])] = g[0]
    return d


def _gather_vjp(i: int, g: Any, y: Any, xs: Sequence[np.ndarray], a: Mapping[str, Any]) -> np.ndarray:
    axis, indices = a.get("axis", 0) % xs[0].ndim, xs[1]
    d = np.zeros_like(xs[0])
    front = np.moveaxis(d, axis, 0)
    # The axes that the indices put at ``axis`` go to the front.
    pieces = np.moveaxis(g[0], range(axis, axis + indices.ndim), range(indices.ndim))
    np.add.at(front, indices.reshape(-1), pieces.reshape((indices.size, *front.shape[1:])))
    return d


def _concat_vjp(i: int, g: Any, y: Any, xs: Sequence[np.ndarray], a: Mapping[str, Any]) -> np.ndarray:
    ends = np.cumsum([x.shape[a["axis"]] for x in xs])
    return np.split(g[0], ends[:-1], axis=a["axis"])[i]


def _where_vjp(i: int, g: Any, y: Any, xs: Sequence[np.ndarray], a: Mapping[str, Any]) -> np.ndarray:
    zero = np.zeros((), g[0].dtype)
    chosen = np.where(xs[0], g[0], zero) if i == 1 else np.where(xs[0], zero, g[0])
    return _unbroadcast(chosen, xs[i].shape)


def _transposed(x: np.ndarray, a: Mapping[str, Any]) -> list[int]:
    return list(a.get("perm", range(x.ndim)[::-1]))


FORWARD: dict[str, Callable[..., Any]] = {
    "Identity": lambda xs, a: xs[0],
    "Add": lambda xs, a: xs[0] + xs[1],
    "Sub": lambda xs, a: xs[0] - xs[1],
    "Mul": lambda xs, a: xs[0] * xs[1],
    "Neg": lambda xs, a: -xs[0],
    "Tanh": lambda xs, a: np.tanh(xs[0]),
    "Sigmoid": lambda xs, a: _sigmoid(xs[0]),
    "Relu": lambda xs, a: np.maximum(xs[0], 0),
    "Exp": lambda xs, a: np.exp(xs[0]),
    "MatMul": lambda xs, a: xs[0] @ xs[1],
    "Gemm": _gemm,
    "Concat": lambda xs, a: np.concatenate(xs, axis=a["axis"]),
    "Transpose": lambda xs, a: xs[0].transpose(_transposed(xs[0], a)),
    "Reshape": lambda xs, a: xs[0].reshape([int(n) or xs[0].shape[k] for k, n in enumerate(xs[1])]),
    "ReduceSum": _reduce(False),
    "ReduceMean": _reduce(True),
    "Softmax": lambda xs, a: _softmax(xs[0], a.get("axis", -1)),
    "Where": lambda xs, a: np.where(xs[0], xs[1], xs[2]),
    "Slice": lambda xs, a: xs[0][_slices(xs[0], xs[1:])],
    "Gather": lambda xs, a: np.take(xs[0], xs[1], axis=a.get("axis", 0)),
    # Operators that carry no derivative.
    "Shape": lambda xs, a: np.array(xs[0].shape, np.int64),
    "Greater": lambda xs, a: xs[0] > xs[1],
    "Less": lambda xs, a: xs[0] < xs[1],
    "Not": lambda xs, a: ~xs[0],
    "Cast": lambda xs, a: xs[0].astype(helper.tensor_dtype_to_np_dtype(a["to"])),
}

VJP: dict[str, Formula] = {
    "Identity": lambda i, g, y, xs, a: g[0],
    "Add": lambda i, g, y, xs, a: _unbroadcast(g[0], xs[i].shape),
    "Sub": lambda i, g, y, xs, a: _unbroadcast(g[0] if i == 0 else -g[0], xs[i].shape),
    "Mul": lambda i, g, y, xs, a: _unbroadcast(g[0] * xs[1 - i], xs[i].shape),
    "Neg": lambda i, g, y, xs, a: -g[0],
    "Tanh": lambda i, g, y, xs, a: g[0] * (1 - y[0] * y[0]),
    "Sigmoid": lambda i, g, y, xs, a: g[0] * y[0] * (1 - y[0]),
    "Relu": lambda i, g, y, xs, a: np.where(xs[0] > 0, g[0], np.zeros((), g[0].dtype)),
    "Exp": lambda i, g, y, xs, a: g[0] * y[0],
    "MatMul": _matmul_vjp,
    "Gemm": _gemm_vjp,
    "Concat": _concat_vjp,
    "Split": lambda i, g, y, xs, a: np.concatenate(g, axis=a.get("axis", 0)),
    "Transpose": lambda i, g, y, xs, a: g[0].transpose(np.argsort(_transposed(xs[0], a))),
    "Reshape": lambda i, g, y, xs, a: g[0].reshape(xs[0].shape),
    "ReduceSum": _reduce_vjp(False),
    "ReduceMean": _reduce_vjp(True),
    "Softmax": lambda i, g, y, xs, a: y[0] * (g[0] - (g[0] * y[0]).sum(a.get("axis", -1), keepdims=True)),
    "Where": _where_vjp,
    "Slice": _slice_vjp,
    "Gather": _gather_vjp,
}


# --- the graph -------------------------------------------------------------------------------------


@dataclass
class Vertex:
    """An operator instance with the tensors it makes."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)

    def forward(self, operands: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        if self.op == "Split":
            ends = np.cumsum(_parts(operands, self.attrs, len(self.outputs)))
            return tuple(np.split(operands[0], ends[:-1], axis=self.attrs.get("axis", 0)))
        return (np.asarray(FORWARD[self.op](operands, self.attrs)),)


@dataclass
class Net:
    """The active part of a model.

    Attributes:
        vertices: in topological order.
        leaves: floating tensors that no operator makes, on a differentiable path to a trained output.
        clamped: trained output -> the tensor whose value node is clamped for it.
        level: of every active tensor; all outputs of a vertex share theirs.
        alias: outputs of the file's Identity vertices -> what they hold.
    """

    vertices: list[Vertex]
    leaves: list[str]
    clamped: dict[str, str]
    level: dict[str, int] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)

    @property
    def k(self) -> int:
        return max(self.level.values())

    def tensors(self) -> set[str]:
        return {*self.leaves, *(t for v in self.vertices for t in v.outputs)}

    def edges(self) -> Iterator[tuple[Vertex, int, str]]:
        """Every differentiable edge: consumer, operand index, operand."""
        active = self.tensors()
        for vertex in self.vertices:
            for index, tensor in enumerate(vertex.inputs):
                if tensor in active and _differentiable(vertex, index):
                    yield vertex, index, tensor


def _differentiable(vertex: Vertex, index: int) -> bool:
    """Whether a derivative reaches this operand, both ends being floating tensors."""
    if vertex.op not in VJP:
        return False
    if vertex.op in ("Add", "Sub", "Mul", "MatMul", "Gemm", "Concat"):
        return True
    return index in (1, 2) if vertex.op == "Where" else index == 0


def _read(model: onnx.ModelProto, *, keep_identities: bool) -> tuple[list[Vertex], list[str], set[str], dict[str, str]]:
    """All vertices, floating leaves, floating tensors, and aliases made by dropped Identity vertices."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    floats = {
        v.name
        for v in (*inferred.input, *inferred.value_info, *inferred.output)
        if v.type.tensor_type.elem_type in _FLOATS
    }
    floats |= {t.name for t in inferred.initializer if t.data_type in _FLOATS}
    leaves = [v.name for v in inferred.input] + [t.name for t in inferred.initializer]
    vertices, alias = [], {}
    for node in model.graph.node:
        inputs = [alias.get(name, name) for name in node.input]
        if node.op_type == "Identity" and not keep_identities:
            alias[node.output[0]] = inputs[0]
        elif node.op_type == "Constant":
            leaves.append(node.output[0])
        else:
            attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            vertices.append(Vertex(node.op_type, inputs, list(node.output), attrs))
    return vertices, [name for name in leaves if name in floats], floats, alias


def _active(vertices: list[Vertex], leaves: list[str], floats: set[str], outputs: Sequence[str]) -> Net:
    """Vertices and leaves on a differentiable path from a leaf to a trained output."""
    carried = set(leaves)
    for vertex in vertices:
        if any(t in carried and _differentiable(vertex, i) for i, t in enumerate(vertex.inputs)):
            carried.update(t for t in vertex.outputs if t in floats)
    wanted, kept = set(outputs), []
    for vertex in reversed(vertices):
        if any(t in wanted and t in carried for t in vertex.outputs):
            kept.append(vertex)
            operands = [t for i, t in enumerate(vertex.inputs) if _differentiable(vertex, i)]
            wanted.update(carried.intersection(operands))
    return Net(kept[::-1], [t for t in leaves if t in wanted], {})


def network(model: onnx.ModelProto, outputs: Sequence[str]) -> Net:
    """The active part with its levels; terminal identities where a trained output is a leaf or consumed."""
    vertices, leaves, floats, alias = _read(model, keep_identities=False)
    names = [alias.get(name, name) for name in outputs]
    net = _active(vertices, leaves, floats, names)
    net.alias = alias
    maker = {t: v for v in net.vertices for t in v.outputs}
    consumed = {tensor for _, _, tensor in net.edges()}
    for name, tensor in zip(outputs, names, strict=True):
        siblings = maker[tensor].outputs if tensor in maker else []
        if tensor not in maker or consumed.intersection(siblings) or names.count(tensor) > 1:
            terminal = f"{name}#terminal"
            net.vertices.append(Vertex("Identity", [tensor], [terminal]))
            net.clamped[name] = terminal
        else:
            net.clamped[name] = tensor
    net.level = _levels(net)
    return net


def _levels(net: Net) -> dict[str, int]:
    """0 for a clamped vertex, else 1 + the maximum over consumers."""
    level = dict.fromkeys(net.clamped.values(), 0)
    operands: dict[int, list[str]] = {}
    for vertex, _, tensor in net.edges():
        operands.setdefault(id(vertex), []).append(tensor)
    for vertex in reversed(net.vertices):
        mine = max(level.get(t, 0) for t in vertex.outputs)
        level.update(dict.fromkeys(vertex.outputs, mine))
        for tensor in operands.get(id(vertex), ()):
            level[tensor] = max(level.get(tensor, 0), mine + 1)
    return level


def levelled(net: Net, identities: str) -> Net:
    """A copy in which every edge spans one level, by one chain an edge or one shared chain a tensor."""
    chains: dict[str, list[str]] = {}
    made: list[Vertex] = []
    level = dict(net.level)
    copies = {id(v): Vertex(v.op, list(v.inputs), list(v.outputs), v.attrs) for v in net.vertices}

    def extend(chain: list[str], origin: str, length: int, label: str) -> str:
        while len(chain) < length:
            source = chain[-1] if chain else origin
            chain.append(f"{origin}#{label}{len(chain) + 1}")
            made.append(Vertex("Identity", [source], [chain[-1]]))
            level[chain[-1]] = level[source] - 1
        return chain[length - 1] if length else origin

    for number, (vertex, index, tensor) in enumerate(net.edges()):
        gap = net.level[tensor] - net.level[vertex.outputs[0]] - 1
        if identities == "edge":
            copies[id(vertex)].inputs[index] = extend([], tensor, gap, f"{number}.")
        else:
            copies[id(vertex)].inputs[index] = extend(chains.setdefault(tensor, []), tensor, gap, "")
    # Operands sit on higher levels than their consumers, so levels give a topological order.
    vertices = sorted([*copies.values(), *made], key=lambda v: -level[v.outputs[0]])
    return Net(vertices, net.leaves, net.clamped, level, net.alias)


def count_identities(net: Net) -> int:
    """Identity vertices inserted, terminal ones among them (the file's own are gone before)."""
    return sum(vertex.op == "Identity" for vertex in net.vertices)


def active_identities(model: onnx.ModelProto, outputs: Sequence[str]) -> int:
    """Identity vertices in the active part of a model as it is written."""
    vertices, leaves, floats, _ = _read(model, keep_identities=True)
    return count_identities(_active(vertices, leaves, floats, outputs))


def check_levelled(model: onnx.ModelProto, outputs: Sequence[str]) -> list[str]:
    """What is not level in a model with real Identity vertices; empty where every path has one length.

    ``outputs`` are the clamped tensors by their names in this model.
    """
    vertices, leaves, floats, _ = _read(model, keep_identities=True)
    net = _active(vertices, leaves, floats, outputs)
    shortest = dict.fromkeys(outputs, 0)
    longest = dict.fromkeys(outputs, 0)
    operands: dict[int, list[str]] = {}
    for vertex, _, tensor in net.edges():
        operands.setdefault(id(vertex), []).append(tensor)
    for vertex in reversed(net.vertices):
        reached = [t for t in vertex.outputs if t in longest]
        near, far = min(shortest[t] for t in reached), max(longest[t] for t in reached)
        for tensor in (*reached, *operands.get(id(vertex), ())):
            step = 0 if tensor in reached else 1
            shortest[tensor] = min(shortest.get(tensor, near + step), near + step)
            longest[tensor] = max(longest.get(tensor, far + step), far + step)
    missing = [f"output {name!r} is not made from any leaf" for name in outputs if name not in net.tensors()]
    return missing + [
        f"tensor {t!r}: paths of {near} to {longest[t]} edges" for t, near in shortest.items() if near != longest[t]
    ]


# --- values ----------------------------------------------------------------------------------------


def evaluate(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Arrays:
    """Every tensor of a model: the forward pass."""
    values = {**{t.name: numpy_helper.to_array(t) for t in model.graph.initializer}, **feeds}
    for node in model.graph.node:
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(attrs["value"])
            continue
        vertex = Vertex(node.op_type, list(node.input), list(node.output), attrs)
        values.update(zip(vertex.outputs, vertex.forward([values[t] for t in vertex.inputs]), strict=True))
    return values


def energy(values: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray]) -> float:
    """Half the sum of squared residuals over the trained outputs."""
    return float(sum(0.5 * np.sum((values[name] - y) ** 2) for name, y in targets.items()))


def _vjp(net: Net, at: Arrays, mu: Arrays, eps: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Every edge's eps_j d mu_j / d x_i, with the tensor it is for."""
    for vertex, index, tensor in net.edges():
        g = tuple(eps[t] for t in vertex.outputs)
        y = tuple(mu[t] for t in vertex.outputs)
        yield tensor, VJP[vertex.op](index, g, y, [at[t] for t in vertex.inputs], vertex.attrs)


def _sums(net: Net, at: Arrays, mu: Arrays, eps: Arrays) -> Arrays:
    """Sum over the consumers of each tensor of their eps_j d mu_j / d x_i."""
    sums: Arrays = {}
    for tensor, term in _vjp(net, at, mu, eps):
        sums[tensor] = sums[tensor] + term if tensor in sums else term
    return sums


def reverse_mode(net: Net, values: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray]) -> Arrays:
    """Backpropagation of the energy to every leaf, in reverse topological order."""
    at = dict(values)
    for vertex in net.vertices:
        at.update(zip(vertex.outputs, vertex.forward([at[t] for t in vertex.inputs]), strict=True))
    bar = {t: np.zeros_like(at[t]) for t in net.tensors()}
    for name, y in targets.items():
        bar[net.clamped[name]] = bar[net.clamped[name]] + (at[net.clamped[name]] - y)
    edges: dict[int, list[tuple[Vertex, int, str]]] = {}
    for edge in net.edges():
        edges.setdefault(id(edge[0]), []).append(edge)
    for j in reversed(net.vertices):
        g, y = tuple(bar[t] for t in j.outputs), tuple(at[t] for t in j.outputs)
        for _, index, tensor in edges.get(id(j), ()):
            bar[tensor] = bar[tensor] + VJP[j.op](index, g, y, [at[t] for t in j.inputs], j.attrs)
    return {leaf: bar[leaf] for leaf in net.leaves}


def simulate(
    net: Net,
    values: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
    *,
    gamma: float = 1.0,
    noise: float = 0.0,
    at_end: bool = False,
    recompute: bool = False,
    printed_sign: bool = False,
    seed: int = 0,
    steps: int | None = None,
    states: list[dict[str, Arrays]] | None = None,
) -> Arrays:
    """The gradient of every leaf by the dynamics, for t = 0 ... K - 1.

    Args:
        net: levelled, or not (the ablation).
        values: the forward pass; tensors outside the active part stay frozen at these.
        gamma: integration step.
        noise: standard deviation of what is added to the value nodes at t = 0.
        at_end: every leaf reads the errors of step K - 1 instead of those of its level.
        recompute: eps is mu - x anew at each step, instead of being carried.
        printed_sign: the inference step with the sign of the paper's Eq. 7.
        steps: how many there are, K by default.
        states: takes the value nodes ``x``, predictions ``mu``, errors ``eps`` and movements ``dx`` of every step, and
            the state after the last.
    """
    rng = np.random.default_rng(seed)
    fixed = set(net.clamped.values())
    x = dict(values)  # leaves and frozen tensors keep their values
    mu: Arrays = {}
    made = [t for v in net.vertices for t in v.outputs]

    def predict() -> Arrays:
        """Predictions of all vertices, from the value nodes of their operands."""
        return {
            t: value
            for v in net.vertices
            for t, value in zip(v.outputs, v.forward([x[s] for s in v.inputs]), strict=True)
        }

    for vertex in net.vertices:
        mu.update(zip(vertex.outputs, vertex.forward([x[t] for t in vertex.inputs]), strict=True))
        x.update({t: mu[t] for t in vertex.outputs})
    for name, y in targets.items():
        x[net.clamped[name]] = y
    if noise:
        for t in made:
            if t not in fixed:
                x[t] = x[t] + noise * rng.standard_normal(x[t].shape).astype(x[t].dtype)
        mu = predict()
    eps = {t: mu[t] - x[t] for t in made}

    gradients: Arrays = {}
    with np.errstate(all="ignore"):  # levels that the wave has passed may overflow; no leaf reads them
        for t in range(net.k if steps is None else steps):
            sums = _sums(net, x, mu, eps)
            for leaf in net.leaves:
                if (net.k if at_end else net.level[leaf]) == t + 1:
                    gradients[leaf] = sums[leaf]
            delta = {}
            for i in made:
                if i in fixed:
                    delta[i] = np.zeros_like(x[i])
                    continue
                flow = sums.get(i, np.zeros_like(x[i]))  # zero for an output of a Split that nothing reads
                delta[i] = x[i].dtype.type(gamma) * (eps[i] + flow if printed_sign else eps[i] - flow)
            if states is not None:
                states.append({"x": dict(x), "mu": dict(mu), "eps": dict(eps), "dx": delta})
            for i in made:
                x[i] = x[i] + delta[i]
            now = predict()
            for i in made:
                eps[i] = now[i] - x[i] if recompute else eps[i] + (now[i] - mu[i]) - delta[i]
            mu = now
    if states is not None:
        states.append({"x": dict(x), "mu": dict(mu), "eps": dict(eps)})
    return gradients


def relative_errors(found: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For each parameter ||a - b|| / max(||b||, 1e-6 of the largest gradient norm)."""
    floor = 1e-6 * max(float(np.linalg.norm(b)) for b in truth.values())
    return {
        name: float(np.linalg.norm(found[name] - b)) / max(float(np.linalg.norm(b)), floor, 1e-300)
        for name, b in truth.items()
    }
