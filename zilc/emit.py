"""Op builder over a GraphSurgeon graph: fresh names, constants, dtypes and shapes.

``op.MatMul(g, w)`` appends a node and returns its output; ``op.Split(x, num_outputs=2, outputs=2)`` returns a
tuple.  Numbers become constants of the dtype of the first tensor operand, lists of ints become int64 constants,
arrays become constants as they are, and None is an absent optional operand.  The same operator on the same operands
is emitted once (every emitted operator is deterministic).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zilc import cuda_forms, dtypes, ir, type_inference
from zilc.graph import fresh_name, names_of
from zilc.lowerings import Lowerings

Operand: TypeAlias = gs.Tensor | float | int | bool | np.ndarray | np.generic | Sequence[int] | None
Dim = int | str | None

_INT64_OUTPUT = frozenset({"Shape", "Size", "NonZero", "ArgMax", "ArgMin"})
_BOOL_OUTPUT = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "IsNaN", "IsInf"}
)
#: Which operand gives the output its dtype, where it is not the first.
_DTYPE_OPERAND = {"Where": 1, "OneHot": 2, "DequantizeLinear": 1}
#: What names of constants begin with.
_CONSTANT = "zilc.const/"


class Emitter:
    """Appends operators to ``graph``.

    Args:
        graph: receives the nodes.  Emitted operators take the form of opset 18; the graph's own opset decides only
            where ONNX Runtime's CUDA provider has no kernel for an operator's later version.
        names: tensor and node names already in use; by default those of the graph.
        lowerings: chooses where a rule has several; by default the one of the least fitted cost.
    """

    def __init__(
        self, graph: gs.Graph, names: set[str] | None = None, lowerings: Lowerings | None = None
    ) -> None:
        self.graph = graph
        #: Whose names are avoided.
        self._among = graph
        self.names = names_of(graph) if names is None else set(names)
        self._made: dict[tuple, tuple[gs.Variable, ...]] = {}
        self._constants: dict[tuple, gs.Constant] = {}
        #: Results of rules that give the cotangents of all operands at once.
        self.shared: dict[tuple, Any] = {}
        #: Rules for single nodes, by their id, in place of those of their operators.
        self.rules: dict[int, Any] = {}
        #: Chooses where a rule has several lowerings.
        self.lowerings = lowerings or Lowerings()
        self._prefix = "zilc"
        self._metadata: dict[str, str] = {}

    @classmethod
    def among(cls, graph: gs.Graph) -> Emitter:
        """An emitter with a graph of its own, whose nodes will be put among those of ``graph``.

        Names in use there are looked for with the first that is given: many passes find nothing to emit.
        """
        made = cls(gs.Graph(opset=graph.opset), set())
        made._among = graph
        del made.names
        return made

    # -- names and places --

    @functools.cached_property
    def names(self) -> set[str]:
        """Tensor and node names in use."""
        return names_of(self._among)

    def fresh(self, name: str) -> str:
        """``name``, or ``name_1``, ``name_2`` … if taken; taken from now on."""
        return fresh_name(name, self.names)

    @contextlib.contextmanager
    def place(self, prefix: str, **metadata: Any) -> Iterator[None]:
        """Nodes emitted inside are named ``prefix/Op`` and carry ``metadata`` as ``zilc.KEY``."""
        old = self._prefix, self._metadata
        self._prefix = prefix
        self._metadata = {f"zilc.{key}": str(value) for key, value in metadata.items() if value is not None}
        try:
            yield
        finally:
            self._prefix, self._metadata = old

    @contextlib.contextmanager
    def noting(self, **metadata: str) -> Iterator[None]:
        """Nodes emitted inside carry ``metadata`` as ``zilc.KEY`` besides what they carry here."""
        old = self._metadata
        self._metadata = {**old, **{f"zilc.{key}": value for key, value in metadata.items()}}
        try:
            yield
        finally:
            self._metadata = old

    @contextlib.contextmanager
    def in_place_of(self, node: gs.Node) -> Iterator[None]:
        """Nodes emitted inside are named after ``node`` and carry all of its metadata, of whoever's making."""
        with self.place(node.name or node.outputs[0].name):
            self._metadata = dict(node.metadata)
            yield

    @property
    def prefix(self) -> str:
        """What names of emitted nodes begin with here."""
        return self._prefix

    @property
    def metadata(self) -> dict[str, str]:
        """What emitted nodes carry here."""
        return dict(self._metadata)

    # -- operators --

    def __getattr__(self, op_type: str) -> Any:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)

        def emit(*operands: Operand, outputs: int = 1, **attrs: Any) -> Any:
            return self.emit(op_type, *operands, outputs=outputs, **attrs)

        return emit

    def emit(self, op_type: str, *operands: Operand, outputs: int = 1, domain: str | None = None, **attrs: Any) -> Any:
        """Append one node, or the few that the target has in its place; returns the output, or a tuple of them.

        Attributes that are None are left to the operator's default.
        """
        form = cuda_forms.FORMS.get(op_type) if self.lowerings.target == "cuda" and domain is None else None
        if form is not None:
            return form(self, *operands, **attrs)
        return self.plain(op_type, *operands, outputs=outputs, domain=domain, **attrs)

    def plain(
        self, op_type: str, *operands: Operand, outputs: int = 1, domain: str | None = None, **attrs: Any
    ) -> Any:
        """:meth:`emit`, always this operator."""
        # A number takes its dtype from the operand that gives the output its own: not from Where's condition.
        value_operands = operands[_DTYPE_OPERAND.get(op_type, 0) :]
        like = next((t for t in (*value_operands, *operands) if isinstance(t, gs.Tensor)), None)
        inputs = [self._operand(t, like) for t in operands]
        while inputs and inputs[-1].name == "":
            inputs.pop()
        attrs = {k: v for k, v in attrs.items() if v is not None}
        key = _key(op_type, domain, inputs, attrs, outputs)
        made = self._made.get(key)
        if made is None:
            made = self._append(op_type, domain, inputs, attrs, outputs)
            self._made[key] = made
        return made[0] if outputs == 1 else made

    def Pad(
        self, x: gs.Tensor, pads: Operand, value: Operand = None, axes: Operand = None, **attrs: Any
    ) -> gs.Variable:
        """``Pad`` with an amount for every axis, wherever the rank is known.

        onnxruntime's transpose optimizer (as of 1.31) moves a Transpose past a Pad as if ``axes`` were absent.
        """
        rank = self.rank(x)
        where = self.value(axes) if isinstance(axes, gs.Tensor) else axes
        if rank is None or where is None:
            return self.emit("Pad", x, pads, value, axes, **attrs)
        order = [int(a) % rank for a in np.asarray(where).reshape(-1)]
        count = len(order)
        # Which entry of pads, zero appended, belongs to each axis: first what goes before, then what goes after.
        before = [order.index(axis) if axis in order else 2 * count for axis in range(rank)]
        entries = [*before, *(k if k == 2 * count else k + count for k in before)]
        amounts = self.value(pads) if isinstance(pads, gs.Tensor) else pads
        if amounts is None:
            zero = self.constant(np.asarray([0], np.int64))
            full: Operand = self.Gather(self.Concat(pads, zero, axis=0), self.constant(np.asarray(entries, np.int64)))
        else:
            numbers = [*np.asarray(amounts).reshape(-1), 0]
            full = [int(numbers[k]) for k in entries]
        return self.emit("Pad", x, full, value, **attrs)

    def adopt(self, node: gs.Node) -> None:
        """Take a node of the graph for one that this emitter made: asked for the same again, it gives its outputs."""
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name.startswith(_CONSTANT):
                array = ir.values(tensor)
                self._constants.setdefault((array.dtype.name, array.shape, array.tobytes()), tensor)
        attrs = {k: v for k, v in node.attrs.items() if v is not None}
        self._made[_key(node.op, node.domain, node.inputs, attrs, len(node.outputs))] = tuple(node.outputs)

    def inside(self) -> Emitter:
        """An emitter for a subgraph of one of this graph's nodes: the two share their names."""
        made = Emitter(gs.Graph(opset=self.graph.opset), set(), self.lowerings)
        made.names, made._prefix = self.names, self._prefix
        return made

    def forget(self) -> None:
        """From here on operators are emitted anew, even those that exist: each time step has vertices of its own."""
        self._made.clear()

    def _append(
        self, op_type: str, domain: str | None, inputs: list[gs.Tensor], attrs: dict[str, Any], outputs: int
    ) -> tuple[gs.Variable, ...]:
        name = self.fresh(f"{self._prefix}/{op_type}")
        results = []
        for index in range(outputs):
            tensor_name = name if outputs == 1 else self.fresh(f"{name}.{index}")
            results.append(gs.Variable(tensor_name, dtype=self.output_dtype(op_type, inputs, attrs, index)))
        packed = {
            k: gs.Constant("", v) if isinstance(v, np.ndarray) else (list(v) if isinstance(v, tuple) else v)
            for k, v in attrs.items()
        }
        node = gs.Node(op=op_type, name=name, attrs=packed, inputs=inputs, outputs=results, domain=domain)
        node.metadata = dict(self._metadata)
        self.graph.nodes.append(node)
        return tuple(results)

    def _operand(self, value: Operand, like: gs.Tensor | None) -> gs.Tensor:
        if value is None:
            return gs.Variable.empty()
        if isinstance(value, gs.Tensor):
            return value
        if isinstance(value, (np.ndarray, np.generic)):
            return self.constant(np.asarray(value))
        if isinstance(value, (list, tuple)):
            return self.constant(np.asarray(value, np.int64))
        if like is None:
            raise TypeError(f"the number {value!r} has no tensor beside it to take its dtype from")
        return self.constant(np.asarray(value, self.dtype(like)))

    def constant(self, array: np.ndarray) -> gs.Constant:
        """A constant, made once for each dtype, shape and content."""
        array = np.ascontiguousarray(array) if array.ndim else np.asarray(array)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            flat = array.reshape(-1)
            label = "_".join(_label(v) for v in flat) if 0 < flat.size <= 4 else "x".join(map(str, array.shape))
            self._constants[key] = gs.Constant(self.fresh(f"{_CONSTANT}{array.dtype.name}/{label}"), array)
        return self._constants[key]

    # -- what is known of a tensor --

    def output_dtype(self, op_type: str, inputs: list[gs.Tensor], attrs: dict[str, Any], index: int) -> Any:
        if op_type in _INT64_OUTPUT or (op_type in ("MaxPool", "TopK") and index == 1):
            return np.dtype(np.int64)
        if op_type in _BOOL_OUTPUT or (op_type == "Dropout" and index == 1):
            return np.dtype(bool)
        if op_type == "Cast":
            return dtypes.np_dtype(attrs["to"])
        if op_type in ("ConstantOfShape",):
            return attrs["value"].dtype if "value" in attrs else np.dtype(np.float32)
        if op_type == "LayerNormalization" and index > 0:
            return dtypes.np_dtype(attrs.get("stash_type", 1))
        which = _DTYPE_OPERAND.get(op_type, 0)
        if which < len(inputs):
            return self.dtype(inputs[which])
        return None

    def dtype(self, x: gs.Tensor) -> np.dtype:
        """numpy dtype of a tensor (ml_dtypes' bfloat16 included)."""
        known = dtypes.np_dtype(x.dtype)
        if known is None:
            self._infer(x)
            known = dtypes.np_dtype(x.dtype)
        if known is None:
            raise TypeError(f"dtype of tensor '{x.name}' is unknown")
        return known

    def dims(self, x: gs.Tensor) -> list[Dim] | None:
        """Shape as far as it is known: ints, names of symbolic dimensions, None for unknown ones.

        None for the whole if not even the rank is known.
        """
        if x.shape is None and isinstance(x, gs.Variable):
            self._infer(x)
        return None if x.shape is None else list(x.shape)

    def rank(self, x: gs.Tensor) -> int | None:
        """Number of dimensions, or None if unknown."""
        dims = self.dims(x)
        return None if dims is None else len(dims)

    def static(self, x: gs.Tensor) -> tuple[int, ...] | None:
        """Shape if every dimension is a known number, else None."""
        dims = self.dims(x)
        if dims is None or not all(isinstance(n, (int, np.integer)) for n in dims):
            return None
        return tuple(int(n) for n in dims)  # type: ignore[arg-type]

    def value(self, x: gs.Tensor | None) -> np.ndarray | None:
        """The array behind a constant, or None for a tensor known only at run time."""
        return ir.values(x) if isinstance(x, gs.Constant) else None

    def shape_of(self, x: gs.Tensor) -> gs.Tensor:
        """int64 shape of ``x``: a constant where it is known, a ``Shape`` node where a dimension is symbolic."""
        known = self.static(x)
        return self.constant(np.asarray(known, np.int64)) if known is not None else self.Shape(x)

    def dim_of(self, x: gs.Tensor, axis: int) -> gs.Tensor:
        """One dimension as an int64 tensor of shape [1]."""
        dims = self.dims(x)
        if dims is not None and isinstance(dims[axis], (int, np.integer)):
            return self.constant(np.asarray([dims[axis]], np.int64))
        return self.Gather(self.Shape(x), self.constant(np.asarray([axis], np.int64)))

    def scalar_like(self, value: float, x: gs.Tensor) -> gs.Constant:
        """A rank-0 constant of the dtype of ``x``."""
        return self.constant(np.asarray(value, self.dtype(x)))

    def zeros_like(self, x: gs.Tensor) -> gs.Tensor:
        """Zeros of the shape and dtype of ``x``."""
        zero = self.scalar_like(0, x)
        return self.Expand(zero, self.shape_of(x))

    def cast(self, x: gs.Tensor, dtype: Any) -> gs.Tensor:
        """``Cast``, or ``x`` itself if it has that dtype."""
        wanted = np.dtype(dtype)
        return x if self.dtype(x) == wanted else self.Cast(x, to=dtypes.onnx_dtype(wanted))

    def widened(self, x: gs.Tensor) -> gs.Tensor:
        """``x`` in float32 where it is of half precision, else ``x`` itself."""
        return self.cast(x, np.float32) if self.dtype(x).name in ("float16", "bfloat16") else x

    def add_at(self, base: gs.Tensor, index: gs.Tensor, updates: gs.Tensor, *, axis: int) -> gs.Tensor:
        """``base`` with ``updates`` added at ``index`` along ``axis``: ScatterElements, places may repeat.

        Half precision is summed in float32, so that it is rounded once; onnxruntime has no kernel in half precision.
        """
        dtype = self.dtype(base)
        made = self.ScatterElements(self.widened(base), index, self.widened(updates), axis=axis, reduction="add")
        return self.cast(made, dtype)

    def count(self, x: gs.Tensor, dtype: Any) -> gs.Tensor:
        """Number of elements as a rank-0 tensor of ``dtype``: a constant where it is known."""
        known = self.static(x)
        if known is not None:
            return self.constant(np.asarray(np.prod(known, dtype=np.int64), dtype))
        if self.lowerings.target == "cuda" and not np.issubdtype(dtype, np.integer) and self.rank(x) is not None:
            return cuda_forms.count(self, x, dtype)
        return self.cast(self._size(x, 0), dtype)

    def size_of(self, x: gs.Tensor) -> gs.Tensor:
        """Number of elements as an int64 tensor of shape [1]: a constant where it is known."""
        known = self.static(x)
        if known is not None:
            return self.constant(np.asarray([np.prod(known, dtype=np.int64)]))
        return self._size(x, 1)

    def _size(self, x: gs.Tensor, rank: int) -> gs.Tensor:
        # From opset 19 on a Size runs on the CPU, and all of x would be copied there; a Shape leaves it where it is.
        if self.graph.opset > 18:
            return self.ReduceProd(self.Shape(x), keepdims=rank)
        return self.Reshape(self.Size(x), [1]) if rank else self.Size(x)

    def as_matrix(self, x: gs.Tensor, axis: int) -> gs.Tensor:
        """``x`` as a matrix: axes before ``axis`` are its rows, the others its columns."""
        dims = self.dims(x)
        if self.graph.opset < 21 or dims is None:
            return self.Flatten(x, axis=axis)
        # The versions of Flatten from opset 21 on have no CUDA kernel, those of Reshape have.
        rows, columns = _product(dims[:axis]), _product(dims[axis:])
        if rows is not None and columns is not None:
            return self.Reshape(x, [rows, columns], allowzero=None if rows and columns else 1)
        if rows or columns:  # what is not known follows from the number of elements
            return self.Reshape(x, [rows or -1, columns or -1])
        shape = self.Shape(x)
        sides = (self.Slice(shape, [0], [axis], [0]), self.Slice(shape, [axis], [len(dims)], [0]))
        return self.Reshape(x, self.Concat(*(self.ReduceProd(d, keepdims=1) for d in sides), axis=0), allowzero=1)

    def _infer(self, x: gs.Variable) -> None:
        """Fill in dtype and shape of an emitted tensor from its producers, nearest first."""
        stack = [x]
        visited: set[str] = set()  # marked when left, not when found: a sibling may need it first
        while stack:
            tensor = stack[-1]
            node = tensor.inputs[0] if tensor.inputs else None
            if node is None or tensor.shape is not None:
                stack.pop()
                continue
            waiting = [
                t
                for t in node.inputs
                if isinstance(t, gs.Variable) and t.name and t.shape is None and t.inputs and t.name not in visited
            ]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            visited.add(tensor.name)
            for output, (dtype, shape) in zip(
                node.outputs, type_inference.infer_types(node, self.graph.opset), strict=True
            ):
                if output.dtype is None:
                    output.dtype = dtype
                if output.shape is None:
                    output.shape = shape


def _product(dims: Sequence[Dim]) -> int | None:
    """Of dimensions that are all known numbers, else None."""
    known = [int(n) for n in dims if isinstance(n, (int, np.integer))]
    return math.prod(known) if len(known) == len(dims) else None


def _key(op: str, domain: str | None, inputs: Sequence[gs.Tensor], attrs: dict[str, Any], outputs: int) -> tuple:
    """What makes two nodes the same."""
    frozen = tuple(sorted((k, _freeze(v)) for k, v in attrs.items()))
    return op, domain or None, tuple(t.name for t in inputs), frozen, outputs


def _freeze(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(value, (gs.Graph, gs.Tensor)):
        return id(value)
    return value


def _label(value: Any) -> str:
    return str(value.item() if isinstance(value, np.generic) else value).replace(" ", "")


FLOAT = int(onnx.TensorProto.FLOAT)
INT64 = int(onnx.TensorProto.INT64)
BOOL = int(onnx.TensorProto.BOOL)
