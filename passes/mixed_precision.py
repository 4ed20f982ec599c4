"""Mixed precision: costly operators in float16 or bfloat16, delicate ones and the parameters in float32.

The pass rewrites the prepared float32 graph before levels are found, so that a Cast is a vertex like any other: it has
a level, an error and a VJP rule, and Z-IL on the rewritten graph equals backprop on it bit for bit.

Three kinds of operators, after the lists of torch.autocast (https://docs.pytorch.org/docs/stable/amp.html, "Autocast Op
Reference"):

- *narrow* (:data:`NARROW`): products, convolutions, recurrences, Attention.  They run in the low type.
- *following* (:data:`FOLLOWING`): cheap ones that lose nothing but rounding.  They run in the low type where what they
  read was computed in it, in float32 where any of it was computed in float32.
- everything else runs in float32: normalizations and batch statistics, softmax, exp, log, pow, divisions by what was
  computed, reductions and cumulative sums, resizing, control flow, operators of other domains.  An operator that nobody
  thought of is in this group.

Leaves do not decide.  A constant follows: a bias that is added to a product is cast, unless a value of it would be lost
(an infinity made of a mask's -1e38, a zero made of an epsilon).  A model input counts as computed in float32.

Each tensor has at most two versions, each made once: t in float32, and t.float16 (t.bfloat16).  So no cast undoes
another.  Names that the user knows stay those of float32 tensors.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx_graphsurgeon as gs

from zilc import dtypes, ir, onnx_io
from zilc.errors import OptionError
from zilc.graph import FROZEN, INFERENCE, PRECISION, Rebuild, captured, fresh_name, is_standard, names_of
from zilc.passes import contracts
from zilc.passes.parameters import READ_LIMIT

#: What ``--precision`` takes beside float32, and ONNX's number of the type.
LOW = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}

NARROW = frozenset(
    {"MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "DeformConv", "PRelu", "RNN", "LSTM", "GRU", "Attention"}
)
#: Operators that give back, entry by entry, what they read (or 0): rounding before them is rounding after them.
MOVING = frozenset(
    {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Identity", "Expand",
     "Tile", "Gather", "DepthToSpace", "SpaceToDepth", "Trilu", "Relu", "MaxPool", "GlobalMaxPool"}
)  # fmt: skip
FOLLOWING = MOVING | {
    "Add", "Sub", "Mul", "Div", "Sum", "Neg", "Abs", "Max", "Min", "Where", "Clip", "Pad", "Dropout", "GatherElements",
    "GatherND", "AveragePool", "Sigmoid", "Tanh", "Gelu", "Erf", "Elu", "Selu", "Celu", "LeakyRelu", "ThresholdedRelu",
    "HardSigmoid", "HardSwish", "Swish",
}  # fmt: skip
#: They read a tensor's shape alone: any version will do.
_SHAPES = frozenset({"Shape", "Size"})
_SINGLE = np.dtype(np.float32)


@dataclass
class MixedPrecision:
    """What was rewritten.

    Attributes:
        dtype: ``float16`` or ``bfloat16``.
        vertices: names of the vertices that compute in it.
        single: how many operators of each kind that makes floating-point numbers compute in float32.
        casts: how many Cast vertices were inserted.
        refused: costly operators that have no form of the low type at the model's opset, and the first opset that has;
            0 where none has.
    """

    dtype: str
    vertices: list[str] = field(default_factory=list)
    single: dict[str, int] = field(default_factory=dict)
    casts: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def data(self) -> dict[str, object]:
        """The same as a document."""
        return {
            "dtype": self.dtype, "vertices": self.vertices, "float32": dict(sorted(self.single.items())),
            "casts": self.casts, "refused": dict(sorted(self.refused.items())),
        }  # fmt: skip


def mixed_precision(
    graph: gs.Graph, dtype: str, *, keep: Collection[str] = (), where: str = ""
) -> tuple[gs.Graph, MixedPrecision]:
    """A new graph whose costly operators compute in ``dtype``, with the same interface and float32 leaves.

    Requires: acyclic(graph); constants lifted, types inferred, a float32 model.
    Ensures:  acyclic(result); inputs, outputs, initializers and the tensors of ``keep`` are as before, in float32.

    Before:  x -> MatMul(W) -> h -> Add(b) -> a -> Softmax -> y
    After:   x -> Cast -> x.float16 -> MatMul(W.float16) -> h.float16 -> Add(b.float16) -> a.float16 -> Cast -> a
             a -> Softmax -> y;   W -> Cast -> W.float16;   b -> Cast -> b.float16

    An operator of :data:`MOVING` between a float32 operator and narrow ones runs on the narrow side of the cast (the
    Relu after a normalization and before a convolution): the values are the same, and half as many bytes are kept.

    Args:
        dtype: ``float16`` or ``bfloat16``.
        keep: tensors that will be asked for by name.
        where: what to call the model in messages.

    Raises:
        OptionError: no such type, or a model that is not float32.
    """
    if dtype not in LOW:
        raise OptionError(
            f"no choice '{dtype}'", where="--precision", hint=f"Choose one of float32, {', '.join(LOW)}."
        )
    contracts.require(contracts.acyclic(graph), "acyclic")
    _ensure_single(graph, where)
    made = _Rewrite(graph, dtype, keep)
    made.decide()
    result = made.rewrite()
    contracts.ensure(contracts.acyclic(result), "acyclic")
    return result, made.found


def _ensure_single(graph: gs.Graph, where: str) -> None:
    """Inputs, outputs and what narrow operators read are float32, where they are floating-point numbers.

    Raises:
        OptionError: the first that is not.
    """
    read = [t for node in graph.nodes if node.op in NARROW and is_standard(node) for t in node.inputs]
    for tensor in (*graph.inputs, *graph.outputs, *read):
        if tensor.name and dtypes.is_float(tensor) and dtypes.np_dtype(tensor.dtype) != _SINGLE:
            raise OptionError(
                f"{where or 'the model'} is not a float32 model: '{tensor.name}' is "
                f"{dtypes.np_dtype(tensor.dtype)}",
                where="--precision",
                hint="Leave it out, or give the float32 model.",
            )


class _Rewrite:
    """Which nodes compute in the low type, and the graph that says so."""

    def __init__(self, graph: gs.Graph, dtype: str, keep: Collection[str]) -> None:
        self.graph, self.found = graph, MixedPrecision(dtype)
        self.dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(LOW[dtype]))
        self.kept = {t.name for t in graph.outputs} | set(keep)
        self.low: set[int] = set()  # nodes that compute in the low type, by id
        self.narrow: set[str] = set()  # tensors that such nodes make
        #: Tensors that do not decide, with whether the low type holds their values: constants, what is moved of them,
        #: and Dropout's masks.
        self.pliant: dict[str, bool] = {}
        self.operands: dict[int, list[int]] = {}
        self.rebuild = Rebuild(graph)
        self.names = names_of(graph)
        self.low_tensors: dict[str, gs.Variable] = {}
        self.widened: set[str] = set()

    # -- the decision --

    def decide(self) -> None:
        """Forwards: narrow operators, and those that follow.  Backwards: what moves to the narrow side of a cast."""
        for node in self.graph.nodes:
            operands = self._typed(node)
            if operands is None:
                self._note(node)
            elif node.op in NARROW or self._follows(node, operands):
                self._lower(node)
            else:
                self._note(node)
        readers: dict[str, list[gs.Node]] = {}
        for node in self.graph.nodes:
            for tensor in (*node.inputs, *(captured(node) if node.attrs else ())):
                if tensor.name:
                    readers.setdefault(tensor.name, []).append(node)
        for node in reversed(self.graph.nodes):
            if id(node) not in self.low and node.op in MOVING and id(node) in self.operands:
                made = [t for t in node.outputs if t.name and dtypes.is_float(t)]
                if all(self._read_low(t.name, readers) for t in made) and not self._looks_up(node):
                    self._lower(node)

    def _typed(self, node: gs.Node) -> list[int] | None:
        """Operands whose type is the output's and may be the low one; None where the node must stay in float32."""
        if not is_standard(node) or node.op not in NARROW | FOLLOWING or getattr(node, FROZEN, False):
            return None
        if not node.outputs or dtypes.np_dtype(node.outputs[0].dtype) != _SINGLE:
            return None
        schema = onnx.defs.get_schema(node.op, self.graph.opset, "")
        variables = {schema.outputs[0].type_str} | ({"T2"} if node.op == "Attention" else set())
        kind = f"tensor({self.found.dtype})"
        if not all(kind in c.allowed_type_strs for c in schema.type_constraints if c.type_param_str in variables):
            if node.op in NARROW:
                self.found.refused[node.op] = self._first_opset(node.op, variables, kind)
            return None
        found = []
        for k, tensor in enumerate(node.inputs):
            formal = schema.inputs[min(k, len(schema.inputs) - 1)]
            if tensor.name and formal.type_str in variables:
                if dtypes.np_dtype(tensor.dtype) != _SINGLE or getattr(tensor, "type", None) not in (
                    "tensor_type", None,
                ):  # fmt: skip
                    return None
                found.append(k)
        if node.op == "Attention" and len(node.inputs) > 3 and dtypes.is_float(node.inputs[3]):
            return None  # an additive mask: in the low type its least numbers would be infinite
        self.operands[id(node)] = found
        return found

    @staticmethod
    def _first_opset(op: str, variables: Collection[str], kind: str) -> int:
        for opset in range(onnx_io.MIN_OPSET, onnx_io.MAX_OPSET + 1):
            try:
                schema = onnx.defs.get_schema(op, opset, "")
            except onnx.defs.SchemaError:
                continue
            if all(kind in c.allowed_type_strs for c in schema.type_constraints if c.type_param_str in variables):
                return opset
        return 0

    def _follows(self, node: gs.Node, operands: list[int]) -> bool:
        """Some operand was computed in the low type, and none in float32 or with values that the low type lacks."""
        some = False
        for k in operands:
            name = node.inputs[k].name
            if name in self.narrow:
                if node.op == "Div" and k == 1:
                    return False  # the reciprocal of what was computed
                some = True
            elif not self._pliant(node.inputs[k]):
                return False
        return some

    def _pliant(self, tensor: gs.Tensor) -> bool:
        """A tensor that does not decide, and that the low type can hold."""
        if tensor.name not in self.pliant and isinstance(tensor, gs.Constant):
            self.pliant[tensor.name] = self._holds(tensor)
        return self.pliant.get(tensor.name, False)

    def _holds(self, tensor: gs.Constant) -> bool:
        """No finite value of a constant becomes infinite, and no single number becomes zero.

        Tensors of :data:`READ_LIMIT` and more are not read: they are weights.
        """
        held = tensor._values
        if held.nbytes >= READ_LIMIT:
            return True
        values = np.asarray(ir.values(tensor), np.float32)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            cast = values.astype(self.dtype).astype(np.float32)
        lost = np.isfinite(values) & ~np.isfinite(cast)
        return not lost.any() and not (values.size == 1 and (cast == 0).any() and (values != 0).any())

    def _note(self, node: gs.Node) -> None:
        """A node that stays in float32."""
        floating = [t for t in node.outputs if t.name and dtypes.is_float(t)]
        read = [t for t in node.inputs if t.name and dtypes.is_float(t)]
        if getattr(node, FROZEN, False):
            # Masks and batch statistics come from the compiler; a mask holds 0 and 1 / (1 - ratio).
            self.pliant.update(dict.fromkeys((t.name for t in floating), True))
            return
        given = all(isinstance(t, gs.Constant) or t.name in self.pliant for t in read)
        if given and node.op in MOVING and is_standard(node):
            self.pliant.update(dict.fromkeys((t.name for t in floating), all(self._pliant(t) for t in read)))

    def _lower(self, node: gs.Node) -> None:
        self.low.add(id(node))
        self.narrow.update(t.name for t in self._results(node))

    def _results(self, node: gs.Node) -> list[gs.Tensor]:
        """Outputs that are of the low type where the node is."""
        return [t for t in node.outputs if t.name and dtypes.np_dtype(t.dtype) == _SINGLE]

    def _read_low(self, name: str, readers: dict[str, list[gs.Node]]) -> bool:
        """A tensor is read, and by nodes of the low type alone, as operands of that type."""
        if name in self.kept or not readers.get(name):
            return False
        for node in readers[name]:
            if node.op in _SHAPES and is_standard(node):
                continue
            places = [k for k, t in enumerate(node.inputs) if t.name == name]
            if id(node) not in self.low or not places or any(k not in self.operands[id(node)] for k in places):
                return False
        return any(id(node) in self.low for node in readers[name])

    def _looks_up(self, node: gs.Node) -> bool:
        """Rows of a constant table, as an embedding's: few of them are read, so the table is not cast."""
        return node.op == "Gather" and (isinstance(node.inputs[0], gs.Constant) or node.inputs[0].name in self.pliant)

    # -- the graph --

    def rewrite(self) -> gs.Graph:
        rebuild = self.rebuild
        for node in self.graph.nodes:
            if id(node) in self.low:
                self._add_low(node)
            elif node.op in _SHAPES and is_standard(node) and node.inputs[0].name in self.narrow:
                rebuild.add(node, [self.low_tensors[node.inputs[0].name]])
            else:
                for tensor in captured(node) if node.attrs else ():
                    self._wide(tensor)
                rebuild.add(node, [self._wide(t) for t in node.inputs])
                if any(dtypes.is_float(t) for t in node.outputs if t.name):
                    self.found.single[node.op] = self.found.single.get(node.op, 0) + 1
            self._mend_metadata(rebuild.nodes[-1])
        everything = ir.tensors(self.graph)
        for name in sorted(self.kept):
            if name in everything:
                self._wide(everything[name])
        return rebuild.finish()

    def _add_low(self, node: gs.Node) -> None:
        places = set(self.operands[id(node)])
        inputs = [self._low(t) if k in places else self._wide(t) for k, t in enumerate(node.inputs)]
        made = self.rebuild.add(node, inputs)
        results = {t.name for t in self._results(node)}
        made.outputs = [self._new(t) if t.name in results else self.rebuild.tensor(t) for t in node.outputs]
        if node.op == "Attention" and "softmax_precision" not in node.attrs:
            made.attrs["softmax_precision"] = int(onnx.TensorProto.FLOAT)
        self.found.vertices.append(node.name or node.outputs[0].name)

    def _new(self, tensor: gs.Tensor) -> gs.Variable:
        """The low version of a tensor, which something is about to make."""
        name = fresh_name(f"{tensor.name}.{self.found.dtype}", self.names)
        shape = None if tensor.shape is None else list(tensor.shape)
        self.low_tensors[tensor.name] = gs.Variable(name, self.dtype, shape)
        return self.low_tensors[tensor.name]

    def _low(self, tensor: gs.Tensor) -> gs.Variable:
        if tensor.name not in self.low_tensors:
            self._cast(self._wide(tensor), self._new(tensor), LOW[self.found.dtype])
        return self.low_tensors[tensor.name]

    def _wide(self, tensor: gs.Tensor) -> gs.Tensor:
        made = self.rebuild.tensor(tensor)
        if tensor.name in self.narrow and tensor.name not in self.widened:
            self.widened.add(tensor.name)
            self._cast(self.low_tensors[tensor.name], made, onnx.TensorProto.FLOAT)
        return made

    def _cast(self, source: gs.Tensor, made: gs.Tensor, to: int) -> None:
        name = fresh_name(f"{made.name}.cast", self.names)
        node = gs.Node("Cast", name=name, attrs={"to": int(to)}, inputs=[source], outputs=[made])
        node.metadata, node.doc_string = {}, ""
        setattr(node, PRECISION, True)
        self.rebuild.nodes.append(node)
        self.found.casts += 1

    def _mend_metadata(self, node: gs.Node) -> None:
        """A mask's inference form takes the shape of a tensor, of which there may be a low version alone."""
        facts = json.loads(node.metadata[INFERENCE]) if INFERENCE in node.metadata else {}
        name = facts.get("shape_of")
        if name in self.narrow and name not in self.widened:
            node.metadata = {
                **node.metadata, INFERENCE: json.dumps({**facts, "shape_of": self.low_tensors[name].name})
            }  # fmt: skip
