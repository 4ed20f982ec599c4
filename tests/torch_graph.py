"""An ONNX graph run by PyTorch: the twin that holds an exported file's own tensors, whatever the exporter did to them.

Every node on a path from a trained tensor is one of PyTorch's own functions, so that autograd differentiates the file.
What no gradient passes (shapes, indices, masks, tables) is ONNX's reference evaluator's.  Nothing here is zilc's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator

Tensor: TypeAlias = torch.Tensor
Value = Any  # a tensor, or a list of tensors for a sequence

_RUNS: dict[str, Callable[..., Any]] = {}


class NoTwin(NotImplementedError):
    """A node on the differentiable path that has no PyTorch form here."""


def runs(*operators: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function (attributes, operands) -> outputs for operators of ONNX's own domain."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in operators:
            _RUNS[name] = function
        return function

    return keep


class TorchGraph:
    """A model as a function of its inputs and of some of its initializers.

    Args:
        model: any opset from 13 on; local functions are inlined here.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.inliner.inline_local_functions(model) if model.functions else model
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.held = {t.name: onnx.numpy_helper.to_array(t) for t in self.model.graph.initializer}

    def __call__(
        self, feeds: Mapping[str, np.ndarray], leaves: Mapping[str, Tensor], outputs: Sequence[str]
    ) -> list[Tensor]:
        """Outputs by name, with ``leaves`` in the place of initializers or of outputs of Constant nodes."""
        values: dict[str, Value] = {n: _tensor(a) for n, a in self.held.items() if n not in leaves}
        values.update({n: _tensor(a) for n, a in feeds.items()})
        values.update(leaves)
        self._run(self.model.graph, values, frozenset(leaves))
        return [values[name] for name in outputs]

    def _run(self, graph: onnx.GraphProto, values: dict[str, Value], fixed: frozenset[str] = frozenset()) -> None:
        for node in graph.node:
            if any(name in fixed for name in node.output):
                continue
            made = self._node(node, values)
            values.update({n: y for n, y in zip(node.output, made, strict=False) if n})

    def _inner(self, graph: onnx.GraphProto, values: Mapping[str, Value], given: Sequence[Value]) -> list[Value]:
        """A subgraph, which sees everything outside."""
        seen = dict(values)
        seen.update({t.name: _tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer})
        seen.update({i.name: x for i, x in zip(graph.input, given, strict=True)})
        self._run(graph, seen)
        return [seen[o.name] for o in graph.output]

    def _node(self, node: onnx.NodeProto, values: Mapping[str, Value]) -> Sequence[Value]:
        operands = [values[n] if n else None for n in node.input]
        if node.op_type in ("If", "Loop", "Scan"):
            return getattr(self, f"_{node.op_type.lower()}")(_attributes(node), operands, values)
        flat = [x for x in operands if isinstance(x, torch.Tensor)]
        flat += [x for y in operands if isinstance(y, list) for x in y]
        moves = any(isinstance(y, list) for y in operands) or node.op_type.startswith("Sequence")
        if moves or any(x.requires_grad for x in flat):
            if node.domain not in ("", "ai.onnx") or (node.op_type not in _RUNS and node.op_type not in _FLAT):
                raise NoTwin(f"{node.domain or 'ai.onnx'}::{node.op_type}")
            if node.op_type in _RUNS:
                made = _RUNS[node.op_type]({**_attributes(node), "outputs": len(node.output)}, *operands)
                return made if isinstance(made, tuple) else (made,)
        return self._reference(node, operands)

    def _reference(self, node: onnx.NodeProto, operands: Sequence[Tensor | None]) -> list[Tensor]:
        given = {n: x.detach().numpy() for n, x in zip(node.input, operands, strict=True) if x is not None}
        infos = [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), list(x.shape))
            for n, x in given.items()
        ]
        outputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in node.output if n]
        graph = onnx.helper.make_graph([node], "one", infos, outputs)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)])
        made = dict(zip([o.name for o in outputs], ReferenceEvaluator(model).run(None, given), strict=True))
        return [_tensor(made[n]) if n else None for n in node.output]

    def _if(self, attrs: dict[str, Any], operands: list[Any], values: Mapping[str, Value]) -> list[Value]:
        return self._inner(attrs["then_branch" if bool(operands[0]) else "else_branch"], values, [])

    def _loop(self, attrs: dict[str, Any], operands: list[Any], values: Mapping[str, Value]) -> list[Value]:
        trips = math.inf if operands[0] is None else int(operands[0])
        going = True if len(operands) < 2 or operands[1] is None else bool(operands[1])
        carried, t, scanned = operands[2:], 0, None
        while going and t < trips:
            made = self._inner(attrs["body"], values, [torch.tensor(t), torch.tensor(True), *carried])
            going, carried = bool(made[0]), made[1 : 1 + len(carried)]
            rest = made[1 + len(carried) :]
            scanned = [[y] for y in rest] if scanned is None else [[*s, y] for s, y in zip(scanned, rest, strict=True)]
            t += 1
        return [*carried, *(torch.stack(s) for s in scanned or [])]

    def _scan(self, attrs: dict[str, Any], operands: list[Any], values: Mapping[str, Value]) -> list[Value]:
        count = attrs["num_scan_inputs"]
        states, xs = operands[:-count], operands[-count:]
        body = attrs["body"]
        k = len(body.output) - len(states)
        into = attrs.get("scan_input_directions", [0] * count)
        out = attrs.get("scan_output_directions", [0] * k)
        axes, out_axes = attrs.get("scan_input_axes", [0] * count), attrs.get("scan_output_axes", [0] * k)
        slices = [x.unbind(a)[:: -1 if d else 1] for x, a, d in zip(xs, axes, into, strict=True)]
        made: list[list[Tensor]] = [[] for _ in range(k)]
        for parts in zip(*slices, strict=True):
            results = self._inner(body, values, [*states, *parts])
            states = results[: len(states)]
            for ys, y in zip(made, results[len(states) :], strict=True):
                ys.append(y)
        return [*states, *(torch.stack(ys[:: -1 if d else 1], a) for ys, a, d in zip(made, out_axes, out, strict=True))]


def _tensor(array: Any) -> Any:
    return torch.from_numpy(np.array(array)) if not isinstance(array, list) else [_tensor(a) for a in array]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    made = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in made.items()}


def _ints(x: Any) -> list[int]:
    return [int(n) for n in x.reshape(-1)] if isinstance(x, torch.Tensor) else [int(n) for n in x]


#: No gradient leaves these: ONNX's reference evaluator does them.
_FLAT = frozenset(
    {"Shape", "Size", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "ArgMax", "ArgMin", "NonZero",
     "IsNaN", "IsInf", "Sign", "Floor", "Ceil", "Round", "Not", "ConstantOfShape", "OneHot", "EyeLike",
     "RandomNormalLike"}
)  # fmt: skip


# -- element by element --

for _name, _function in {
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Exp": torch.exp, "Log": torch.log,
    "Sqrt": torch.sqrt, "Neg": torch.neg, "Abs": torch.abs, "Erf": torch.erf, "Sin": torch.sin, "Cos": torch.cos,
    "Tan": torch.tan, "Atan": torch.atan, "Asin": torch.asin, "Acos": torch.acos, "Sinh": torch.sinh,
    "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "Reciprocal": torch.reciprocal, "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "Softsign": F.softsign, "Mish": F.mish, "Identity": lambda x: x,
}.items():  # fmt: skip
    runs(_name)(lambda attrs, x, f=_function: f(x))

for _name, _function in {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow, "MatMul": torch.matmul,
}.items():
    runs(_name)(lambda attrs, a, b, f=_function: f(a, b))

# ONNX's 1/6 is an attribute of float32.
runs("HardSwish")(lambda attrs, x: x * torch.clamp(float(np.float32(1 / 6)) * x + 0.5, 0.0, 1.0))
runs("Sum")(lambda attrs, *xs: sum(xs[1:], xs[0]))
runs("Mean")(lambda attrs, *xs: sum(xs[1:], xs[0]) / len(xs))
runs("Where")(lambda attrs, c, a, b: torch.where(c, a, b))
runs("PRelu")(lambda attrs, x, slope: torch.where(x < 0, slope * x, x))
runs("Elu")(lambda attrs, x: F.elu(x, attrs.get("alpha", 1.0)))
runs("Celu")(lambda attrs, x: F.celu(x, attrs.get("alpha", 1.0)))
runs("LeakyRelu")(lambda attrs, x: F.leaky_relu(x, attrs.get("alpha", float(np.float32(0.01)))))
runs("ThresholdedRelu")(lambda attrs, x: F.threshold(x, attrs.get("alpha", 1.0), 0.0))
runs("Gelu")(lambda attrs, x: F.gelu(x, approximate=attrs.get("approximate", "none")))
runs("Swish")(lambda attrs, x: x * torch.sigmoid(attrs.get("alpha", 1.0) * x))
runs("Dropout")(lambda attrs, x, *_: x)
runs("CastLike")(lambda attrs, x, like: x.to(like.dtype))
runs("Mod")(lambda attrs, a, b: torch.fmod(a, b) if attrs.get("fmod") else torch.remainder(a, b))


def _extreme(pick: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(attrs: dict[str, Any], *xs: Tensor) -> Tensor:
        made = xs[0]
        for x in xs[1:]:
            made = pick(made, x)
        return made

    return run


runs("Max")(_extreme(torch.maximum))
runs("Min")(_extreme(torch.minimum))


@runs("Selu")
def _selu(attrs: dict[str, Any], x: Tensor) -> Tensor:
    gamma, alpha = attrs.get("gamma", float(np.float32(1.0507009873554805))), attrs.get(
        "alpha", float(np.float32(1.6732632423543772))
    )
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@runs("HardSigmoid")
def _hard_sigmoid(attrs: dict[str, Any], x: Tensor) -> Tensor:
    return torch.clamp(attrs.get("alpha", float(np.float32(0.2))) * x + attrs.get("beta", 0.5), 0.0, 1.0)


@runs("Clip")
def _clip(attrs: dict[str, Any], x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return torch.clamp(x, None if low is None else low.detach(), None if high is None else high.detach())


@runs("Cast")
def _cast(attrs: dict[str, Any], x: Tensor) -> Tensor:
    return x.to(_tensor(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(attrs["to"]))).dtype)


@runs("Trilu")
def _trilu(attrs: dict[str, Any], x: Tensor, k: Tensor | None = None) -> Tensor:
    return (torch.triu if attrs.get("upper", 1) else torch.tril)(x, 0 if k is None else int(k))


@runs("CumSum")
def _cumsum(attrs: dict[str, Any], x: Tensor, axis: Tensor) -> Tensor:
    a = int(axis)
    x = x.flip(a) if attrs.get("reverse") else x
    made = x.cumsum(a)
    made = made - x if attrs.get("exclusive") else made
    return made.flip(a) if attrs.get("reverse") else made


# -- products and convolutions --


@runs("Gemm")
def _gemm(attrs: dict[str, Any], a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a, b = a.T if attrs.get("transA") else a, b.T if attrs.get("transB") else b
    made = attrs.get("alpha", 1.0) * (a @ b)
    return made if c is None else made + attrs.get("beta", 1.0) * c


runs("Einsum")(lambda attrs, *xs: torch.einsum(attrs["equation"], *xs))


def _padding(
    attrs: dict[str, Any], size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding at the start and the end of each spatial axis."""
    n, auto = len(size), attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((math.ceil(m / s) - 1) * s + (k - 1) * d + 1 - m, 0)
            for m, k, s, d in zip(size, kernel, strides, dilations, strict=True)
        ]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        return (less, more) if auto == "SAME_UPPER" else (more, less)
    pads = list(attrs.get("pads", [0] * 2 * n)) if auto == "NOTSET" else [0] * 2 * n
    return pads[:n], pads[n:]


def _pad(x: Tensor, start: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    widths = [n for pair in zip(reversed(start), reversed(end), strict=True) for n in pair]
    return F.pad(x, widths, value=value) if any(widths) else x


@runs("Conv")
def _conv(attrs: dict[str, Any], x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    n = x.ndim - 2
    strides, dilations = attrs.get("strides", [1] * n), attrs.get("dilations", [1] * n)
    start, end = _padding(attrs, x.shape[2:], w.shape[2:], strides, dilations)
    function = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    return function(_pad(x, start, end), w, b, strides, 0, dilations, attrs.get("group", 1))


@runs("ConvTranspose")
def _conv_transpose(attrs: dict[str, Any], x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    n = x.ndim - 2
    if attrs.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in attrs:
        raise NoTwin("ConvTranspose with automatic padding")
    pads = list(attrs.get("pads", [0] * 2 * n))
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    strides, extra = attrs.get("strides", [1] * n), attrs.get("output_padding", [0] * n)
    if pads[:n] == pads[n:]:
        return function(x, w, b, strides, pads[:n], extra, attrs.get("group", 1), attrs.get("dilations", [1] * n))
    made = function(x, w, b, strides, 0, 0, attrs.get("group", 1), attrs.get("dilations", [1] * n))
    made = _pad(made, [0] * n, extra)
    return _pad(made, [-p for p in pads[:n]], [-p for p in pads[n:]])


# -- pooling --


@runs("MaxPool")
def _max_pool(attrs: dict[str, Any], x: Tensor) -> Tensor:
    n, kernel = x.ndim - 2, list(attrs["kernel_shape"])
    strides, dilations = attrs.get("strides", [1] * n), attrs.get("dilations", [1] * n)
    start, end = _padding(attrs, x.shape[2:], kernel, strides, dilations)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1]
    return function(_pad(x, start, end, -math.inf), kernel, strides, 0, dilations, bool(attrs.get("ceil_mode")))


@runs("AveragePool")
def _average_pool(attrs: dict[str, Any], x: Tensor) -> Tensor:
    n, kernel = x.ndim - 2, list(attrs["kernel_shape"])
    strides = attrs.get("strides", [1] * n)
    start, end = _padding(attrs, x.shape[2:], kernel, strides, [1] * n)
    if any(d != 1 for d in attrs.get("dilations", [1])):
        raise NoTwin("AveragePool with dilations")
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]
    inside = _pad(torch.ones_like(x), start, end, 1.0 if attrs.get("count_include_pad") else 0.0)
    # PyTorch's divisor, the same in both, cancels; beyond the padding (ceil_mode) nothing counts.
    ceil = bool(attrs.get("ceil_mode"))
    return function(_pad(x, start, end), kernel, strides, 0, ceil) / function(inside, kernel, strides, 0, ceil)


runs("GlobalAveragePool")(lambda attrs, x: x.mean(tuple(range(2, x.ndim)), keepdim=True))
runs("GlobalMaxPool")(lambda attrs, x: x.amax(tuple(range(2, x.ndim)), keepdim=True))


# -- reductions --

_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceSum": lambda x, a, k: x.sum(a, keepdim=k),
    "ReduceMean": lambda x, a, k: x.mean(a, keepdim=k),
    "ReduceMax": lambda x, a, k: x.amax(a, keepdim=k),
    "ReduceMin": lambda x, a, k: x.amin(a, keepdim=k),
    "ReduceL1": lambda x, a, k: x.abs().sum(a, keepdim=k),
    "ReduceL2": lambda x, a, k: x.square().sum(a, keepdim=k).sqrt(),
    "ReduceSumSquare": lambda x, a, k: x.square().sum(a, keepdim=k),
    "ReduceLogSum": lambda x, a, k: x.sum(a, keepdim=k).log(),
    "ReduceLogSumExp": lambda x, a, k: x.logsumexp(a, keepdim=k),
    "ReduceProd": lambda x, a, k: x.prod(a[0], keepdim=k) if len(a) == 1 else x.flatten().prod(),
}
for _name, _reduce in _REDUCTIONS.items():

    def _reduced(attrs: dict[str, Any], x: Tensor, axes: Tensor | None = None, f: Any = _reduce) -> Tensor:
        chosen = _ints(axes) if axes is not None else list(attrs.get("axes", []))
        if not chosen and attrs.get("noop_with_empty_axes"):
            return x
        return f(x, tuple(chosen) or tuple(range(x.ndim)), bool(attrs.get("keepdims", 1)))

    runs(_name)(_reduced)

runs("Softmax")(lambda attrs, x: torch.softmax(x, attrs.get("axis", -1)))
runs("LogSoftmax")(lambda attrs, x: torch.log_softmax(x, attrs.get("axis", -1)))


# -- shapes and indices --


@runs("Reshape")
def _reshape(attrs: dict[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    wanted = _ints(shape)
    if not attrs.get("allowzero"):
        wanted = [x.shape[k] if n == 0 else n for k, n in enumerate(wanted)]
    return x.reshape(wanted)


@runs("Transpose")
def _transpose(attrs: dict[str, Any], x: Tensor) -> Tensor:
    return x.permute(attrs.get("perm", list(range(x.ndim))[::-1]))


runs("Concat")(lambda attrs, *xs: torch.cat(xs, attrs["axis"]))
runs("Tile")(lambda attrs, x, repeats: x.repeat(_ints(repeats)))


@runs("Flatten")
def _flatten(attrs: dict[str, Any], x: Tensor) -> Tensor:
    axis = attrs.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


@runs("Expand")
def _expand(attrs: dict[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(_ints(shape))))


@runs("Squeeze")
def _squeeze(attrs: dict[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


@runs("Unsqueeze")
def _unsqueeze(attrs: dict[str, Any], x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(a % rank for a in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


@runs("Slice")
def _slice(
    attrs: dict[str, Any], x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:  # fmt: skip
    chosen = _ints(axes) if axes is not None else list(range(starts.numel()))
    by = _ints(steps) if steps is not None else [1] * len(chosen)
    for axis, start, end, step in zip(chosen, _ints(starts), _ints(ends), by, strict=True):
        size = x.shape[axis]
        # ONNX clamps as Python does, but for an end below the start of a backward slice.
        last = None if step < 0 and end < -size else end
        x = x.index_select(axis, torch.arange(size)[np.arange(size)[slice(start, last, step)].copy()])
    return x


@runs("Gather")
def _gather(attrs: dict[str, Any], x: Tensor, index: Tensor) -> Tensor:
    axis = attrs.get("axis", 0) % x.ndim
    flat = torch.where(index < 0, index + x.shape[axis], index).reshape(-1)
    made = x.index_select(axis, flat)
    return made.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@runs("GatherElements")
def _gather_elements(attrs: dict[str, Any], x: Tensor, index: Tensor) -> Tensor:
    axis = attrs.get("axis", 0)
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


@runs("GatherND")
def _gather_nd(attrs: dict[str, Any], x: Tensor, index: Tensor) -> Tensor:
    batch = attrs.get("batch_dims", 0)
    if batch:
        heads = torch.meshgrid(*[torch.arange(n) for n in index.shape[:batch]], indexing="ij")
        extra = index.ndim - 1 - batch
        heads = tuple(h.reshape(*h.shape, *[1] * extra).expand(index.shape[:-1]) for h in heads)
        return x[(*heads, *index.unbind(-1))]
    return x[tuple(index.unbind(-1))]


def _combine(mode: str, held: Tensor, place: tuple[Tensor, ...], updates: Tensor) -> Tensor:
    if mode == "none":
        return held.index_put(place, updates)
    if mode == "add":
        return held.index_put(place, updates, accumulate=True)
    raise NoTwin(f"a scatter that combines by {mode}")


@runs("ScatterElements")
def _scatter_elements(attrs: dict[str, Any], x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis, mode = attrs.get("axis", 0), attrs.get("reduction", "none")
    index = torch.where(index < 0, index + x.shape[axis], index)
    if mode == "none":
        return torch.scatter(x, axis, index, updates)
    if mode == "add":
        return torch.scatter_add(x, axis, index, updates)
    return torch.scatter_reduce(x, axis, index, updates, {"mul": "prod", "max": "amax", "min": "amin"}[mode])


@runs("ScatterND")
def _scatter_nd(attrs: dict[str, Any], x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    return _combine(attrs.get("reduction", "none"), x, tuple(index.unbind(-1)), updates)


@runs("Split")
def _split(attrs: dict[str, Any], x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = attrs.get("axis", 0)
    if sizes is not None:
        return tuple(x.split(_ints(sizes), axis))
    count = attrs.get("num_outputs", attrs["outputs"])
    return tuple(x.split(math.ceil(x.shape[axis] / count), axis))


@runs("Pad")
def _pad_operator(
    attrs: dict[str, Any], x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    widths = _ints(pads)
    chosen = [a % x.ndim for a in _ints(axes)] if axes is not None else list(range(x.ndim))
    start, end = [0] * x.ndim, [0] * x.ndim
    for k, axis in enumerate(chosen):
        start[axis], end[axis] = widths[k], widths[len(chosen) + k]
    mode = attrs.get("mode", "constant")
    if mode == "constant":
        return _pad(x, start, end, 0.0 if value is None else float(value))
    # Any axis, by reading: PyTorch's own reflection stops at the last three axes.
    for axis in range(x.ndim):
        place = np.arange(x.shape[axis])
        if start[axis] or end[axis]:
            place = np.pad(place, (start[axis], end[axis]), mode="edge" if mode == "edge" else mode)
            x = x.index_select(axis, torch.from_numpy(place))
    return x


@runs("DepthToSpace")
def _depth_to_space(attrs: dict[str, Any], x: Tensor) -> Tensor:
    if attrs.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, attrs["blocksize"])
    n, c, h, w = x.shape
    s = attrs["blocksize"]
    return x.reshape(n, s, s, c // s**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // s**2, h * s, w * s)


@runs("SpaceToDepth")
def _space_to_depth(attrs: dict[str, Any], x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    s = attrs["blocksize"]
    return x.reshape(n, c, h // s, s, w // s, s).permute(0, 3, 5, 1, 2, 4).reshape(n, c * s * s, h // s, w // s)


@runs("TopK")
def _top_k(attrs: dict[str, Any], x: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.topk(x, int(k), attrs.get("axis", -1), bool(attrs.get("largest", 1))))


@runs("Compress")
def _compress(attrs: dict[str, Any], x: Tensor, condition: Tensor) -> Tensor:
    kept = condition.nonzero().reshape(-1)
    return x.flatten()[kept] if "axis" not in attrs else x.index_select(attrs["axis"], kept)


@runs("ReverseSequence")
def _reverse_sequence(attrs: dict[str, Any], x: Tensor, lengths: Tensor) -> Tensor:
    time, batch = attrs.get("time_axis", 0), attrs.get("batch_axis", 1)
    rows = []
    for row, length in zip(x.unbind(batch), _ints(lengths), strict=True):
        axis = time - (time > batch)
        rest = row.narrow(axis, length, row.shape[axis] - length)
        rows.append(torch.cat([row.narrow(axis, 0, length).flip(axis), rest], axis))
    return torch.stack(rows, batch)


# -- normalization --


@runs("BatchNormalization")
def _batch_norm(attrs: dict[str, Any], x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean.detach(), var.detach(), scale, bias, eps=attrs.get("epsilon", float(np.float32(1e-5))))


@runs("LayerNormalization")
def _layer_norm(attrs: dict[str, Any], x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[attrs.get("axis", -1) % x.ndim :]
    made = F.layer_norm(x, shape, eps=attrs.get("epsilon", float(np.float32(1e-5)))) * scale
    return made if bias is None else made + bias


@runs("RMSNormalization")
def _rms_norm(attrs: dict[str, Any], x: Tensor, scale: Tensor) -> Tensor:
    shape = x.shape[attrs.get("axis", -1) % x.ndim :]
    return F.rms_norm(x, shape, eps=attrs.get("epsilon", float(np.float32(1e-5)))) * scale


@runs("InstanceNormalization")
def _instance_norm(attrs: dict[str, Any], x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=attrs.get("epsilon", float(np.float32(1e-5))))


@runs("GroupNormalization")
def _group_norm(attrs: dict[str, Any], x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = attrs["num_groups"]
    if scale.numel() != x.shape[1]:  # opset 18: one number a group
        scale, bias = (p.repeat_interleave(x.shape[1] // groups) for p in (scale, bias))
    return F.group_norm(x, groups, scale, bias, attrs.get("epsilon", float(np.float32(1e-5))))


@runs("LpNormalization")
def _lp_norm(attrs: dict[str, Any], x: Tensor) -> Tensor:
    return x / x.norm(attrs.get("p", 2), attrs.get("axis", -1), keepdim=True)


@runs("LRN")
def _local_response(attrs: dict[str, Any], x: Tensor) -> Tensor:
    size = attrs["size"]
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    squares = F.pad(x.square().movedim(1, -1), (before, after)).unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    alpha, beta = attrs.get("alpha", float(np.float32(1e-4))), attrs.get("beta", 0.75)
    return x / (attrs.get("bias", 1.0) + alpha / size * squares) ** beta


# -- attention, images, recurrences --


@runs("Attention")
def _attention(
    attrs: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *past: Any
) -> Tensor:
    if any(p is not None for p in past) or attrs["outputs"] > 1 or q.ndim != 4 or attrs.get("softcap"):
        raise NoTwin("Attention with a past, further outputs, flat heads or a soft cap")
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * attrs.get("scale", 1 / math.sqrt(q.shape[-1]))
    if attrs.get("is_causal"):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ v


@runs("RotaryEmbedding")
def _rotary(attrs: dict[str, Any], x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None = None) -> Tensor:
    if x.ndim != 4 or attrs.get("interleaved") or attrs.get("rotary_embedding_dim"):
        raise NoTwin("RotaryEmbedding of flat heads, interleaved or partial")
    if position is not None:
        cos, sin = cos[position], sin[position]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


@runs("GridSample")
def _grid_sample(attrs: dict[str, Any], x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(attrs.get("mode", "linear"), attrs.get("mode", "bilinear"))
    padding, corners = attrs.get("padding_mode", "zeros"), bool(attrs.get("align_corners"))
    return F.grid_sample(x, grid, mode, padding, corners)


@runs("AffineGrid")
def _affine_grid(attrs: dict[str, Any], theta: Tensor, size: Tensor) -> Tensor:
    return F.affine_grid(theta, _ints(size), bool(attrs.get("align_corners")))


@runs("Col2Im")
def _col2im(attrs: dict[str, Any], x: Tensor, size: Tensor, block: Tensor) -> Tensor:
    pads = list(attrs.get("pads", [0, 0, 0, 0]))
    if len(pads) != 4 or pads[:2] != pads[2:]:
        raise NoTwin("Col2Im of other than images, or padded to one side")
    return F.fold(
        x, _ints(size), _ints(block), list(attrs.get("dilations", [1, 1])), pads[:2], list(attrs.get("strides", [1, 1]))
    )


@runs("DFT")
def _dft(attrs: dict[str, Any], x: Tensor, length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    if attrs.get("inverse") and attrs.get("onesided"):
        raise NoTwin("DFT back to real numbers")
    along = int(attrs.get("axis", 1) if axis is None else axis)
    along += x.ndim if along < 0 else 0
    turned = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0] + 0j
    count = None if length is None else int(length)
    made = (torch.fft.ifft if attrs.get("inverse") else torch.fft.fft)(turned, count, along)
    made = made.narrow(along, 0, made.shape[along] // 2 + 1) if attrs.get("onesided") else made
    return torch.view_as_real(made)


@runs("Resize")
def _resize(
    attrs: dict[str, Any], x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    mode, where = attrs.get("mode", "nearest"), attrs.get("coordinate_transformation_mode", "half_pixel")
    if "axes" in attrs or attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NoTwin("Resize of chosen axes")
    corners = where == "align_corners"
    names = {"nearest": "nearest", "linear": ("linear", "bilinear", "trilinear")[x.ndim - 3], "cubic": "bicubic"}
    options: dict[str, Any] = {} if mode == "nearest" else {"align_corners": corners}
    if mode == "nearest" and (where != "asymmetric" or attrs.get("nearest_mode") != "floor"):
        raise NoTwin(f"Resize to the nearest by {where}")
    if mode == "cubic" and attrs.get("cubic_coeff_a", -0.75) != -0.75:
        raise NoTwin("Resize by another cubic")
    if mode != "nearest" and where not in ("align_corners", "half_pixel", "pytorch_half_pixel"):
        raise NoTwin(f"Resize by {where}")
    if sizes is not None and sizes.numel():
        options["antialias"] = bool(attrs.get("antialias"))
        return F.interpolate(x, size=_ints(sizes)[2:], mode=names[mode], **options)
    factors = [float(f) for f in scales[2:]]  # type: ignore[index]
    options["recompute_scale_factor"] = False
    return F.interpolate(x, scale_factor=factors, mode=names[mode], **options)


@runs("LSTM", "GRU", "RNN")
def _recurrent(
    attrs: dict[str, Any], x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h0: Tensor | None = None, c0: Tensor | None = None, peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    hidden = r.shape[2]
    kind = {4: "LSTM", 3: "GRU", 1: "RNN"}[r.shape[1] // hidden]
    named = "activations" in attrs and kind != "RNN"
    odd = attrs.get("layout") or peepholes is not None or named or "clip" in attrs
    if odd:
        raise NoTwin(f"{kind} with peepholes, other activations or batch first")
    ways = w.shape[0]
    activation = torch.relu if "relu" in str(attrs.get("activations", "")).lower() else torch.tanh
    steps, batch = x.shape[:2]
    outputs, finals, cells = [], [], []
    for d in range(ways):
        backward = attrs.get("direction", "forward") == "reverse" or d == 1
        wb, rb = (b[d].chunk(2) if b is not None else (x.new_zeros(w.shape[1]),) * 2)
        h = x.new_zeros(batch, hidden) if h0 is None else h0[d]
        c = x.new_zeros(batch, hidden) if c0 is None else c0[d]
        ys: list[Tensor] = [x.new_zeros(batch, hidden)] * steps
        for t in reversed(range(steps)) if backward else range(steps):
            of_x, of_h = F.linear(x[t], w[d], wb), F.linear(h, r[d], rb)
            if kind == "RNN":
                new, cell = activation(of_x + of_h), c
            elif kind == "LSTM":
                i, o, f, g = (of_x + of_h).chunk(4, -1)
                cell = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                new = torch.sigmoid(o) * torch.tanh(cell)
            else:
                (xz, xr, xh), (hz, hr, hh) = of_x.chunk(3, -1), of_h.chunk(3, -1)
                z, gate = torch.sigmoid(xz + hz), torch.sigmoid(xr + hr)
                if attrs.get("linear_before_reset"):
                    made = torch.tanh(xh + gate * hh)
                else:
                    bias = rb.chunk(3)[2]
                    made = torch.tanh(xh + F.linear(gate * h, r[d].chunk(3)[2], bias))
                new, cell = (1 - z) * made + z * h, c
            live = None if lengths is None else (t < lengths).unsqueeze(-1)
            h = new if live is None else torch.where(live, new, h)
            c = cell if live is None else torch.where(live, cell, c)
            ys[t] = new if live is None else torch.where(live, new, torch.zeros_like(new))
        outputs.append(torch.stack(ys))
        finals.append(h)
        cells.append(c)
    return torch.stack(outputs, 1), torch.stack(finals), torch.stack(cells)


# -- sequences --

runs("SequenceEmpty")(lambda attrs: ([],))
runs("SequenceConstruct")(lambda attrs, *xs: (list(xs),))
runs("SequenceAt")(lambda attrs, xs, k: xs[int(k)])
runs("SequenceLength")(lambda attrs, xs: torch.tensor(len(xs)))
runs("SequenceInsert")(lambda attrs, xs, x, k=None: ([*xs[: _at(k, xs)], x, *xs[_at(k, xs) :]],))


def _at(k: Tensor | None, xs: list[Tensor]) -> int:
    return len(xs) if k is None else int(k)


@runs("ConcatFromSequence")
def _concat_from_sequence(attrs: dict[str, Any], xs: list[Tensor]) -> Tensor:
    return torch.stack(xs, attrs["axis"]) if attrs.get("new_axis") else torch.cat(xs, attrs["axis"])


@runs("SplitToSequence")
def _split_to_sequence(attrs: dict[str, Any], x: Tensor, sizes: Tensor | None = None) -> tuple[list[Tensor]]:
    axis = attrs.get("axis", 0)
    if sizes is None:
        parts = x.split(1, axis)
        return ([p if attrs.get("keepdims", 1) else p.squeeze(axis) for p in parts],)
    return (list(x.split(int(sizes) if sizes.ndim == 0 else _ints(sizes), axis)),)
