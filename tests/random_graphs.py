"""Random small ONNX models: DAGs with skips, shared leaves, repeated operands, frozen branches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests import simulator

T = TypeVar("T")

#: Values of a tensor stay below this, and this far from a kink or a comparison.
BOUND, MARGIN = 4.0, 0.02


@dataclass
class Sample:
    """A model with what it takes to train it.

    Attributes:
        feeds: float and int64 arrays by input name; float64 whatever the model's precision.
        outputs: the trained outputs.
        targets: by trained output, float64.
        leaves: floating inputs and initializers on a differentiable path to a trained output.
        inputs: those of ``leaves`` that are inputs.
        features: which of the difficult things it holds.
    """

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    outputs: list[str]
    targets: dict[str, np.ndarray]
    leaves: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    features: set[str] = field(default_factory=set)

    def cast(self, dtype: type[np.floating[Any]]) -> Sample:
        """The same sample with every floating tensor of ``dtype``; its values fit float32 exactly."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.DOUBLE:
                array = numpy_helper.to_array(tensor).astype(dtype)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        for info in (*model.graph.input, *model.graph.output):
            if info.type.tensor_type.elem_type == TensorProto.DOUBLE:
                info.type.tensor_type.elem_type = kind
        for attribute in itertools.chain.from_iterable(n.attribute for n in model.graph.node):
            if attribute.name == "to" and attribute.i == TensorProto.DOUBLE:
                attribute.i = kind
            if attribute.name == "value" and attribute.t.data_type == TensorProto.DOUBLE:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(dtype)))
        feeds = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in self.feeds.items()}
        targets = {k: np.asarray(v, dtype) for k, v in self.targets.items()}
        return replace(self, model=model, feeds=feeds, targets=targets)

    def symbolic(self) -> Sample:
        """The same sample with a symbol of its own for every dimension of every input."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for info in model.graph.input:
            for axis, dim in enumerate(info.type.tensor_type.shape.dim):
                dim.dim_param = f"{info.name}_{axis}"
        for info in model.graph.output:
            for dim in info.type.tensor_type.shape.dim:
                dim.Clear()
        return replace(self, model=model)


class Chooser(Protocol):
    """Where the builder's choices come from."""

    def integer(self, low: int, high: int) -> int: ...


class Seeded:
    """Choices of a pseudo-random generator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))


class Drawn:
    """Choices of hypothesis, which can shrink them."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))


class Builder:
    """Adds random operators to a graph, evaluating as it goes so that values stay tame."""

    def __init__(self, chooser: Chooser, seed: int) -> None:
        self.chooser = chooser
        self.values_rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[str] = []
        self.value: dict[str, np.ndarray] = {}  # every tensor
        self.pool: list[str] = []  # floating tensors that may be operands
        self.leaves: list[str] = []
        self.features: set[str] = set()

    # -- choices --

    def pick(self, items: Sequence[T]) -> T:
        return items[self.chooser.integer(0, len(items) - 1)]

    def chance(self, percent: int) -> bool:
        return self.chooser.integer(1, 100) > 100 - percent

    def tensor(self, test: Callable[[np.ndarray], bool] = lambda v: True) -> str | None:
        """A tensor of the pool that passes ``test``; recent ones more often, so that graphs get deep."""
        fitting = [name for name in self.pool if test(self.value[name])]
        if not fitting:
            return None
        return self.pick(fitting[-3:]) if self.chance(55) else self.pick(fitting)

    # -- tensors and nodes --

    def numbers(self, shape: Sequence[int]) -> np.ndarray:
        """Multiples of 1/256 within ±1.3, never near 0: the same numbers in float32 and float64."""
        size = np.round(self.values_rng.uniform(0.2, 1.3, tuple(shape)) * 256) / 256
        return np.where(self.values_rng.random(tuple(shape)) < 0.5, -size, size)

    def parameter(self, shape: Sequence[int]) -> str:
        name = f"w{len(self.initializers)}"
        array = self.numbers(shape)
        if self.chance(8):
            # A constant vertex is a leaf too, though not one that is asked to be trained here.
            name = f"c{len(self.nodes)}"
            self.nodes.append(helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(array)))
            self.value[name] = array
            self.features.add("constant vertex")
            return name
        self.initializers.append(numpy_helper.from_array(array, name))
        self.value[name] = array
        self.leaves.append(name)
        return name

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        name = f"k{len(self.initializers)}"
        self.value[name] = np.asarray(values, dtype)
        self.initializers.append(numpy_helper.from_array(self.value[name], name))
        return name

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, **attrs: Any) -> list[str]:
        """Append a node and evaluate it."""
        number = len(self.nodes)
        names = [f"t{number}" if outputs == 1 else f"t{number}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"n{number}", **attrs))
        vertex = simulator.Vertex(op, list(inputs), names, attrs)
        self.value.update(zip(names, vertex.forward([self.value[t] for t in inputs]), strict=True))
        return names

    def keep(self, names: Sequence[str]) -> None:
        """Offer floating tensors as operands, squashed first where they have grown."""
        for name in names:
            if not np.abs(self.value[name]).max(initial=0.0) <= BOUND:
                name = self.node("Tanh", [name])[0]
            self.pool.append(name)

    def partner(self, x: str) -> str:
        """A second operand that broadcasts with ``x``: itself, another tensor, a used leaf, or a new leaf."""
        shape = self.value[x].shape
        kind = self.chooser.integer(0, 9)
        if kind == 0:
            self.features.add("operand twice")
            return x
        if kind <= 4:
            found = self.tensor(lambda v: _broadcasts(v.shape, shape))
            if found is not None:
                return found
        if kind <= 6:
            used = [n for n in self.leaves if _broadcasts(self.value[n].shape, shape)]
            if used:
                self.features.add("shared leaf")
                return self.pick(used)
        self.features.add("broadcasting")
        forms: list[tuple[int, ...]] = [shape, shape[-1:], (1, *shape[-1:]), (1,), (1,) * max(len(shape), 1)]
        if shape:
            forms.append((*shape[:-1], 1))
        if len(shape) == 1:
            forms.append((2, *shape))
        return self.parameter(self.pick(forms) or (1,))

    def mask(self, x: str) -> str:
        """A boolean tensor that broadcasts with ``x``; comparisons are taken away from ties."""
        value = self.value[x]
        self.features.add("frozen branch")
        threshold = self.constant(np.float64(self.pick([-0.5, 0.0, 0.25])), np.float64)
        if self.chance(60) and np.abs(value - self.value[threshold]).min(initial=1.0) > MARGIN:
            mask = self.node(self.pick(["Greater", "Less"]), [x, threshold])[0]
            return self.node("Not", [mask])[0] if self.chance(30) else mask
        return self.constant(self.values_rng.random(value.shape[-1:]) < 0.5, np.bool_)

    # -- operators: each returns what it made, or nothing if no operand fits --

    def unary(self) -> list[str]:
        x = self.tensor()
        value = self.value[x]
        op = self.pick(["Tanh", "Sigmoid", "Relu", "Exp", "Neg", "Identity"])
        near_kink = op == "Relu" and np.abs(value).min(initial=1.0) < MARGIN
        if near_kink or (op == "Exp" and value.max(initial=0.0) > 1.3):
            op = "Tanh"
        if op == "Identity":
            self.features.add("identity in file")
        return self.node(op, [x])

    def binary(self) -> list[str]:
        x = self.tensor()
        pair = [x, self.partner(x)]
        return self.node(self.pick(["Add", "Mul", "Sub"]), pair[::-1] if self.chance(30) else pair)

    def matmul(self) -> list[str]:
        x = self.tensor(lambda v: v.ndim in (2, 3))
        if x is None:
            return []
        shape = self.value[x].shape
        if shape[-1] == shape[-2] and self.chance(40):
            self.features.add("operand twice")
            return self.node("MatMul", [x, x])
        leaf = [n for n in self.leaves if self.value[n].ndim == 2 and self.value[n].shape[0] == shape[-1]]
        if leaf and self.chance(40):
            self.features.add("shared leaf")
            return self.node("MatMul", [x, self.pick(leaf)])
        other = self.tensor(lambda v: v.ndim == 2 and v.shape[0] == shape[-1])
        if other is not None and self.chance(30):
            return self.node("MatMul", [x, other])
        n, m = shape[-1], self.chooser.integer(1, 4)
        form = self.pick([(n, m), (n, n), (n,), (shape[0], n, m) if len(shape) == 3 else (n, m)])
        return self.node("MatMul", [x, self.parameter(form)])

    def gemm(self) -> list[str]:
        x = self.tensor(lambda v: v.ndim == 2)
        if x is None:
            return []
        trans_a, trans_b = self.chooser.integer(0, 1), self.chooser.integer(0, 1)
        rows, n = self.value[x].shape[::-1] if trans_a else self.value[x].shape
        m = self.chooser.integer(1, 4)
        inputs = [x, self.parameter((m, n) if trans_b else (n, m))]
        form = self.pick([None, (m,), (1, m), (rows, 1), (1,), (rows, m)])
        if form is not None:
            same = [t for t in self.pool if self.value[t].shape == form]
            inputs.append(self.pick(same) if same and self.chance(30) else self.parameter(form))
        alpha, beta = self.pick([1.0, 0.5]), self.pick([1.0, 0.5])
        return self.node("Gemm", inputs, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta)

    def concat(self) -> list[str]:
        x = self.tensor(lambda v: v.ndim > 0)
        if x is None:
            return []
        shape = self.value[x].shape
        axis = self.chooser.integer(-len(shape), len(shape) - 1)
        parts = [x]
        for _ in range(self.chooser.integer(1, 2)):
            other = self.tensor(lambda v: _but(v.shape, axis) == _but(shape, axis))
            parts.append(other if other is not None else x)
        return self.node("Concat", parts, axis=axis) if sum(self.value[p].size for p in parts) <= 40 else []

    def split(self) -> list[str]:
        x = self.tensor(lambda v: max(v.shape, default=0) >= 2)
        if x is None:
            return []
        shape = self.value[x].shape
        axis = self.pick([k for k, n in enumerate(shape) if n >= 2])
        self.features.add("several outputs of one vertex")
        if self.chance(50):
            first = self.chooser.integer(1, shape[axis] - 1)
            sizes = self.constant([first, shape[axis] - first])
            return self.node("Split", [x, sizes], outputs=2, axis=axis)
        return self.node("Split", [x], outputs=2, axis=axis, num_outputs=2)

    def transpose(self) -> list[str]:
        x = self.tensor(lambda v: v.ndim >= 2)
        if x is None:
            return []
        perm = list(range(self.value[x].ndim))
        for k in range(len(perm) - 1, 0, -1):
            other = self.chooser.integer(0, k)
            perm[k], perm[other] = perm[other], perm[k]
        return self.node("Transpose", [x], perm=perm)

    def reshape(self) -> list[str]:
        x = self.tensor(lambda v: v.ndim > 0)
        if x is None:
            return []
        size, shape = self.value[x].size, self.value[x].shape
        like = [t for t in self.pool if self.value[t].size == size and self.value[t].shape != shape]
        if like and self.chance(50):
            self.features.add("frozen branch")
            return self.node("Reshape", [x, self.node("Shape", [self.pick(like)])[0]])
        if self.chance(30):
            # The first dimension read from the tensor itself, as exporters do it.
            self.features.add("frozen branch")
            first = self.node("Gather", [self.node("Shape", [x])[0], self.constant([0])])[0]
            return self.node("Reshape", [x, self.node("Concat", [first, self.constant([-1])], axis=0)[0]])
        forms = [(-1,), (1, -1), (shape[0], -1), (-1, shape[-1])] + [(0, -1)] * (len(shape) > 1)
        return self.node("Reshape", [x, self.constant(self.pick(forms))])

    def reduction(self) -> list[str]:
        x = self.tensor(lambda v: v.ndim >= 1)
        if x is None:
            return []
        axis = self.chooser.integer(-self.value[x].ndim, self.value[x].ndim - 1)
        op = self.pick(["ReduceMean", "ReduceSum"])
        if self.chance(15):
            return self.node(op, [x], keepdims=1)
        keep = 1 if self.value[x].ndim == 1 and not self.chance(20) else self.chooser.integer(0, 1)
        return self.node(op, [x, self.constant([axis])], keepdims=keep)

    def softmax(self) -> list[str]:
        x = self.tensor(lambda v: v.ndim >= 1)
        if x is None:
            return []
        axis = self.chooser.integer(-self.value[x].ndim, self.value[x].ndim - 1)
        if self.value[x].shape[axis] < 2:
            return []
        # Weighted, because the sum of a softmax has no gradient but the rounding of one.
        soft = self.node("Softmax", [x], axis=axis)[0]
        return self.node("Mul", [soft, self.parameter(self.value[x].shape)])

    def where(self) -> list[str]:
        x = self.tensor(lambda v: v.ndim >= 1)
        if x is None:
            return []
        pair = [x, self.partner(x)]
        return self.node("Where", [self.mask(x), *(pair[::-1] if self.chance(50) else pair)])

    def masked(self) -> list[str]:
        x = self.tensor(lambda v: v.ndim >= 1)
        if x is None:
            return []
        return self.node("Mul", [x, self.node("Cast", [self.mask(x)], to=TensorProto.DOUBLE)[0]])

    def slice(self) -> list[str]:
        x = self.tensor(lambda v: max(v.shape, default=0) >= 2)
        if x is None:
            return []
        shape = self.value[x].shape
        axis = self.pick([k for k, n in enumerate(shape) if n >= 2])
        n = shape[axis]
        cuts = [(1, n, 1), (0, n - 1, 1), (-n, 1000, 2), (n - 1, -n - 1, -1), (0, -1, 1)]
        start, end, step = self.pick(cuts)
        return self.node("Slice", [x, *(self.constant([k]) for k in (start, end, axis, step))])

    def gather(self) -> list[str]:
        x = self.tensor(lambda v: v.ndim >= 1)
        if x is None:
            return []
        axis = self.chooser.integer(-self.value[x].ndim, self.value[x].ndim - 1)
        n = self.value[x].shape[axis]
        indices = self.values_rng.integers(0, n, self.pick([(2,), (3,), (2, 2)]))
        self.features.add("frozen branch")
        if self.chance(40):
            name = f"i{len(self.inputs)}"
            self.inputs.append(name)
            self.value[name] = indices.astype(np.int64)
        else:
            name = self.constant(indices)
        return self.node("Gather", [x, name], axis=axis) if self.value[x].size * indices.size <= 60 else []

    def step(self) -> None:
        """One more operator; now and then its outputs lead nowhere."""
        made = self.pick(
            [
                self.unary, self.binary, self.matmul, self.unary, self.binary, self.gemm, self.concat,
                self.split, self.transpose, self.reshape, self.reduction, self.softmax, self.where,
                self.masked, self.slice, self.gather,
            ]
        )()  # fmt: skip
        if made and self.chance(6):
            self.features.add("dead branch")
        else:
            self.keep(made)

    # -- the whole --

    def start(self) -> None:
        """One to three inputs, a few parameters beside them."""
        rows = self.chooser.integer(1, 3)
        for k in range(self.chooser.integer(1, 3)):
            shape = self.pick([(rows, 3), (rows, 2), (3, 3), (2, rows, 3), (3,)])
            name = f"x{k}"
            self.inputs.append(name)
            self.leaves.append(name)
            self.value[name] = self.numbers(shape)
            self.pool.append(name)

    def unread(self) -> list[str]:
        used = {name for node in self.nodes for name in node.input}
        return [name for name in self.pool if name not in used and name not in self.leaves]

    def trained(self) -> list[str]:
        """One to three trained outputs: ends, interior tensors, leaves, an Identity of something."""
        ends = self.unread()
        if len(ends) > 1 and self.chance(60):
            flat = [self.node("Reshape", [name, self.constant([-1])])[0] for name in ends]
            ends = self.node("Concat", flat, axis=0)
        made = [name for name in self.pool if name not in self.leaves]
        if not ends:
            ends = self.node("Tanh", [self.pick(self.pool)])
        chosen = [ends[-1]]
        for _ in range(self.chooser.integer(0, 2)):
            kind = self.chooser.integer(0, 9)
            if kind <= 3:
                name = self.pick(ends)
            elif kind <= 7 and made:
                name = self.pick(made)
                self.features.add("interior output")
            elif kind == 8:
                name = self.pick(self.leaves)
                self.features.add("leaf as output")
            else:
                name = self.node("Identity", [self.pick([*self.leaves, *made, *ends])])[0]
                self.features.add("identity as output")
            if name not in chosen:
                chosen.append(name)
        if len(chosen) > 1:
            self.features.add("several trained outputs")
        return chosen

    def finish(self, outputs: list[str]) -> Sample:
        """The model; interior outputs are graph outputs, or left for ``--output`` to name."""
        made = {name for node in self.nodes for name in node.output}
        used = {name for node in self.nodes for name in node.input}
        aliases = {node.output[0] for node in self.nodes if node.op_type == "Identity"}
        declared = [n for n in outputs if n in made and (n not in used or self.chance(50))]
        plain = [n for n in self.unread() if n not in outputs and n not in aliases]
        declared += [n for n in plain if self.chance(30)]
        declared = declared or [next(n for n in reversed(self.nodes) if n.op_type != "Constant").output[0]]
        graph = helper.make_graph(
            self.nodes,
            "random",
            [self._info(name) for name in self.inputs],
            [self._info(name) for name in declared],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        net = simulator.network(model, outputs)
        final = {name: self.value[name] for name in outputs}
        targets = {k: np.asarray(np.round(v * 256) / 256 - self.numbers(v.shape)) for k, v in final.items()}
        sample = Sample(
            model,
            {name: self.value[name] for name in self.inputs},
            outputs,
            targets,
            [n for n in net.leaves if n in self.leaves],
            [n for n in net.leaves if n in self.inputs],
            self.features,
        )
        sample.features |= {f"leaf on {'odd' if net.level[n] % 2 else 'even'} level" for n in net.leaves}
        if simulator.count_identities(simulator.levelled(net, "shared")):
            sample.features.add("skip")
        return sample

    def _info(self, name: str) -> onnx.ValueInfoProto:
        array = self.value[name]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def _broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes broadcast, and to no more than a few elements."""
    try:
        return int(np.prod(np.broadcast_shapes(a, b))) <= 40
    except ValueError:
        return False


def _but(shape: tuple[int, ...], axis: int) -> tuple[int, ...] | None:
    """A shape with one dimension taken out, its rank in front."""
    return (len(shape), *np.delete(shape, axis)) if -len(shape) <= axis < len(shape) else None


def build(chooser: Chooser, *, max_steps: int = 16) -> Sample:
    """One model from a source of choices."""
    builder = Builder(chooser, chooser.integer(0, 2**20))
    builder.start()
    for _ in range(chooser.integer(3, max_steps)):
        builder.step()
    return builder.finish(builder.trained())


def well_conditioned(sample: Sample) -> bool:
    """Whether no gradient is nearly lost in cancellation, where any two orders of summation differ."""
    values = simulator.evaluate(sample.model, sample.feeds)
    net = simulator.network(sample.model, sample.outputs)
    norms = [float(np.linalg.norm(g)) for g in simulator.reverse_mode(net, values, sample.targets).values()]
    return bool(norms) and max(norms) < 1e4 and all(n == 0 or n > 1e-4 * max(norms) for n in norms)


def seeded(seed: int, *, max_steps: int = 16) -> Sample:
    """The model of a seed: the first of its draws that is well conditioned."""
    chooser = Seeded(seed)
    while True:
        sample = build(chooser, max_steps=max_steps)
        if sample.leaves and well_conditioned(sample):
            return sample


@st.composite
def samples(draw: Callable[..., Any], max_steps: int = 16) -> Sample:
    """Hypothesis strategy for :class:`Sample`, in float64; ``Sample.cast`` gives float32."""
    from hypothesis import assume

    sample = build(Drawn(draw), max_steps=max_steps)
    assume(bool(sample.leaves) and well_conditioned(sample))
    return sample
