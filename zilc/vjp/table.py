"""The table of VJP rules, and the one driver that applies them.

A rule gives, for each operand of an operator, a formula for the vector-Jacobian product of one edge:

    defvjp("Exp", lambda op, g, y, x: op.Mul(g, y))

``op`` is the emitter, ``g`` the cotangent, ``y`` the output (the prediction), then the operands (their value
nodes; None where an optional one is absent), then the operator's attributes by keyword, defaults filled in from
ONNX's schema.  ``None`` in place of a formula means that no gradient reaches that operand.  An operator that is not
in the table is an error, never a zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import onnx.defs
import onnx.helper
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.emit import Emitter

Formula = Callable[..., gs.Tensor | None]
Whole = Callable[[Emitter, gs.Node, list[gs.Tensor | None]], dict[int, gs.Tensor]]


@dataclass(frozen=True)
class Rule:
    """How cotangents pass one operator, from opset ``since`` on.

    Attributes:
        formulas: one per operand; None where no gradient flows.
        variadic: for operators with any number of operands: ``formula(op, g, y, index, *operands, **attrs)``.
        broadcasting: the driver sums each cotangent down to its operand's shape.
        multi: ``g`` and ``y`` are tuples, one entry an output (``g`` has None where no cotangent arrives).
        extra_outputs: indices of optional outputs that the rule reads and the forward vertex must therefore make.
        whole: for operators with subgraphs: ``whole(op, node, cotangents)`` gives the cotangents of all operands at
            once, by index; tensors that the subgraphs capture are counted after the listed operands.
        prepare: ``prepare(op, node)`` makes a forward vertex keep what ``whole`` reads, beyond optional outputs.
        note: one line for ``zilc ops``: conventions at kinks and limits.
    """

    op: str
    domain: str
    since: int
    formulas: tuple[Formula | None, ...] = ()
    variadic: Formula | None = None
    broadcasting: bool = False
    multi: bool = False
    extra_outputs: tuple[int, ...] = ()
    whole: Whole | None = None
    prepare: Callable[[Emitter, gs.Node], None] | None = None
    note: str = ""

    def formula(self, operand: int) -> Callable[..., Any] | None:
        """The formula of one operand; None where no gradient flows to it."""
        if self.variadic is not None:
            return self.variadic
        if self.whole is not None:
            return self.whole
        return self.formulas[operand] if operand < len(self.formulas) else None

    @property
    def differentiable(self) -> bool:
        return self.variadic is not None or self.whole is not None or any(f is not None for f in self.formulas)


@dataclass
class Table:
    """Rules by (domain, operator), newest first."""

    rules: dict[tuple[str, str], list[Rule]] = field(default_factory=dict)

    def add(self, rule: Rule) -> None:
        entries = self.rules.setdefault((rule.domain, rule.op), [])
        entries[:] = sorted(
            [r for r in entries if r.since != rule.since] + [rule], key=lambda r: r.since, reverse=True
        )

    def lookup(self, op: str, opset: int, domain: str | None = None) -> Rule | None:
        """The newest rule not above ``opset``, or None."""
        for rule in self.rules.get(("" if domain in (None, "ai.onnx") else domain, op), ()):
            if rule.since <= opset:
                return rule
        return None

    def __iter__(self) -> Iterator[Rule]:
        for key in sorted(self.rules):
            yield from self.rules[key]


TABLE = Table()
#: By operator, where a quantised tensor carries the gradient (``--straight-through``).
STRAIGHT: dict[str, Rule] = {}


def defvjp(
    op: str,
    *formulas: Formula | None,
    since: int = 1,
    domain: str = "",
    multi: bool = False,
    extra_outputs: tuple[int, ...] = (),
    note: str = "",
) -> None:
    """One formula per operand, ``formula(op, g, y, *operands, **attrs)``."""
    TABLE.add(Rule(op, domain, since, formulas, multi=multi, extra_outputs=extra_outputs, note=note))


def broadcasting(op: str, *formulas: Formula | None, since: int = 1, domain: str = "", note: str = "") -> None:
    """Like :func:`defvjp`, for operators that broadcast: formulas give cotangents of the output's shape."""
    TABLE.add(Rule(op, domain, since, formulas, broadcasting=True, note=note))


def variadic(
    op: str,
    formula: Formula,
    *,
    since: int = 1,
    domain: str = "",
    broadcast: bool = False,
    multi: bool = False,
    note: str = "",
) -> None:
    """One formula for any number of operands, ``formula(op, g, y, index, *operands, **attrs)``."""
    TABLE.add(Rule(op, domain, since, variadic=formula, broadcasting=broadcast, multi=multi, note=note))


def defwhole(
    op: str,
    whole: Whole,
    *,
    prepare: Callable[[Emitter, gs.Node], None] | None = None,
    since: int = 1,
    domain: str = "",
    note: str = "",
) -> None:
    """One formula that gives the cotangents of all operands, captured ones too, at once."""
    TABLE.add(Rule(op, domain, since, whole=whole, prepare=prepare, note=note))


def no_gradient(*ops: str, since: int = 1, domain: str = "", note: str = "") -> None:
    """Operators through which no gradient passes."""
    for op in ops:
        TABLE.add(Rule(op, domain, since, note=note))


def lookup(node: gs.Node, opset: int) -> Rule | None:
    """The rule of a node's operator at ``opset``: the written one, else one derived from its function body, or None."""
    straight = STRAIGHT.get(node.op)
    if straight is not None and any(dtypes.is_straight(t) for t in (*node.inputs, *node.outputs)):
        return straight
    rule = TABLE.lookup(node.op, opset, node.domain)
    if rule is not None:
        return rule
    from zilc.vjp import composite

    return composite.derive(node, opset)


@cache
def _schema_defaults(op: str, opset: int) -> dict[str, Any]:
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return {}
    defaults: dict[str, Any] = {}
    for name, attribute in schema.attributes.items():
        value = attribute.default_value
        if value is not None and value.type != 0:
            got = onnx.helper.get_attribute_value(value)
            defaults[name] = got.decode() if isinstance(got, bytes) else got
        else:
            defaults[name] = None
    return defaults


def attributes(node: gs.Node, opset: int) -> dict[str, Any]:
    """A node's attributes over its schema's defaults; None where there is no default."""
    domain = node.domain or ""
    base = _schema_defaults(node.op, opset) if domain in ("", "ai.onnx") else {}
    return {**base, **node.attrs}


def vjp(op: Emitter, node: gs.Node, operand: int, cotangents: list[gs.Tensor | None]) -> gs.Tensor | None:
    """The vector-Jacobian product of one edge, epsilon_j d mu_j / d x_i (ZIL.md, section 1).

    Args:
        node: the consumer j, in the emitter's graph.
        operand: which of its operands x_i is.
        cotangents: one an output of ``node``; None where none arrives.

    Returns:
        a tensor of the operand's shape, or None if no gradient flows along this edge.
    """
    opset = op.graph.opset
    rule = op.rules.get(id(node)) or lookup(node, opset)
    assert rule is not None, node.op  # missing rules are reported before emission starts
    formula = rule.formula(operand)
    if formula is None:
        return None
    if rule.whole is not None:
        key = (id(node), *(g.name if g is not None else None for g in cotangents))
        if key not in op.shared:
            op.shared[key] = rule.whole(op, node, cotangents)
        return op.shared[key].get(operand)
    outputs = [t if t.name else None for t in node.outputs]
    if rule.multi:
        g: Any = tuple(cotangents)
        y: Any = tuple(outputs)
    else:
        if cotangents[0] is None:
            return None
        g = cotangents[0]
        y = tuple(outputs) if rule.extra_outputs else outputs[0]
    operands = [t if t.name else None for t in node.inputs]
    # Absent trailing operands are passed as None, so that a formula can name them all.
    operands += [None] * (len(rule.formulas) - len(operands))
    attrs = attributes(node, opset)
    if rule.variadic is not None:
        result = formula(op, g, y, operand, *operands, **attrs)
    else:
        result = formula(op, g, y, *operands, **attrs)
    if result is not None and rule.broadcasting:
        x, out = node.inputs[operand], node.outputs[0]
        result = unbroadcast(op, result, x, out)
    if isinstance(result, gs.Variable):
        _shape_like(op, result, node.inputs[operand])
    return result


def _shape_like(op: Emitter, g: gs.Variable, x: gs.Tensor) -> None:
    """Note that ``g`` has the shape of ``x``: inference loses symbols, even ranks, where shapes are run-time values."""
    dims = op.dims(x)
    if dims is None:
        return
    known = None if all(isinstance(n, int) for n in dims) else op.dims(g)
    g.shape = list(dims) if known is None else [m if n is None else n for n, m in zip(dims, known, strict=True)]


def ensure_outputs(op: Emitter, node: gs.Node, rule: Rule) -> None:
    """Make the optional outputs of a forward vertex that its rule reads, and whatever else it must keep."""
    if rule.prepare is not None:
        rule.prepare(op, node)
    for index in rule.extra_outputs:
        while len(node.outputs) <= index:
            node.outputs.append(gs.Variable.empty())
        if not node.outputs[index].name:
            made = gs.Variable(op.fresh(f"{node.outputs[0].name}.{index}"))
            made.dtype = op.output_dtype(node.op, list(node.inputs), dict(node.attrs), index)
            node.outputs[index] = made


def unbroadcast(op: Emitter, g: gs.Tensor, x: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
    """Sum ``g``, of the shape of ``y``, down to the shape of ``x``, which was broadcast to it.

    The one place where broadcasting is undone (ONNX's multidirectional broadcasting).  Where a symbolic dimension
    leaves open whether an axis was broadcast, the axes are found at run time.
    """
    xs, ys = op.dims(x), op.dims(y)
    if xs is not None and ys is not None:
        lead = len(ys) - len(xs)
        axes = list(range(lead))
        certain = True
        for axis, (n, m) in enumerate(zip(xs, ys[lead:], strict=True)):
            if n == m and n is not None:
                continue
            if n == 1:
                axes.append(lead + axis)
            elif isinstance(n, int):
                continue  # a known dimension above 1 is never broadcast
            else:
                certain = False
        if certain:
            return sum_axes(op, g, axes, lead, xs)
    # Axes to sum: where the padded shape of x is 1; summing an axis of size 1 changes nothing.
    x_shape, y_shape = op.Shape(x), op.Shape(y)
    pad = op.Sub(op.Shape(y_shape), op.Shape(x_shape))  # [1]: leading axes that x lacks
    ones = op.Expand(op.constant(_int64([1])), pad)
    padded = op.Concat(ones, x_shape, axis=0)
    where = op.Reshape(op.NonZero(op.Equal(padded, op.constant(_int64([1])))), op.constant(_int64([-1])))
    return op.Reshape(op.ReduceSum(g, where, keepdims=1, noop_with_empty_axes=1), x_shape)


def sum_axes(op: Emitter, g: gs.Tensor, axes: list[int], lead: int, xs: list[Any]) -> gs.Tensor:
    """Sum over known axes; the first ``lead`` of them vanish, the others stay with size 1."""
    if not axes:
        return g
    if len(axes) == lead:
        return op.ReduceSum(g, axes, keepdims=0)
    summed = op.ReduceSum(g, axes, keepdims=1)
    return op.Squeeze(summed, list(range(lead))) if lead else summed


def _int64(values: list[int]) -> Any:
    import numpy as np

    return np.asarray(values, np.int64)


def is_differentiable_operand(node: gs.Node, operand: int, opset: int) -> bool:
    """Whether a derivative can flow from ``node`` to this operand: see :func:`differentiable_operands`."""
    return differentiable_operands(node, opset)(operand)


def differentiable_operands(node: gs.Node, opset: int) -> Callable[[int], bool]:
    """Which operands of ``node`` a derivative can flow to.

    Both ends must hold floating-point numbers, as far as types are known.  An operator without a rule counts as
    differentiable, so that levels do not depend on what zilc can differentiate.
    """
    if not any(t.name and dtypes.may_hold_floats(t) for t in node.outputs):
        return lambda operand: False
    rule: Rule | None = None
    known = False

    def flows(operand: int) -> bool:
        nonlocal rule, known
        tensor = node.inputs[operand]
        if not tensor.name or not dtypes.may_hold_floats(tensor):
            return False
        if not known:
            rule, known = lookup(node, opset), True
        return rule is None or rule.formula(operand) is not None

    return flows
