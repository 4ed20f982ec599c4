"""Which leaves are trained, and why the others are not (CONTRACT: "Parameters, decided in one place")."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes, ir
from zilc.errors import ModelError, OptionError
from zilc.graph import FROZEN, PRECISION, Dataflow, every_node

#: Values are looked at only in tensors smaller than this; larger ones are never read.
READ_LIMIT = 1 << 20
#: Values from here on stand for minus infinity in masks.
MASK_VALUE = 1e30

_MOVES = frozenset(
    {"Reshape", "Transpose", "Expand", "Unsqueeze", "Squeeze", "Cast", "CastLike", "Slice", "Split", "Concat",
     "Identity", "Tile", "Flatten", "Dropout"}
)  # fmt: skip
_RECURRENT = frozenset({"RNN", "LSTM", "GRU"})
_NORMALIZATION = frozenset(
    {"BatchNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization",
     "RMSNormalization", "SimplifiedLayerNormalization"}
)  # fmt: skip
_PRODUCT = frozenset({"MatMul", "Gemm", "Einsum"})
_CONVOLUTION = frozenset({"Conv", "ConvTranspose", "DeformConv", "CausalConvWithState"})
_WEIGHTED = _RECURRENT | _NORMALIZATION | _PRODUCT | _CONVOLUTION | {"PRelu"}
_QUANTISED = frozenset(
    {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
)
#: (operator, operand) pairs that bound, compare, index, scale or pad.
_SERVANT = {
    "Clip": "bounds a Clip", "Resize": "scales a Resize", "Upsample": "scales an Upsample", "Pad": "pads",
    "Range": "bounds a Range", "Where": "is chosen by a Where", "Equal": "is compared", "Greater": "is compared",
    "GreaterOrEqual": "is compared", "Less": "is compared", "LessOrEqual": "is compared",
    "Pow": "is an exponent or base", "OneHot": "fills a OneHot", "Max": "bounds a Max", "Min": "bounds a Min",
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A floating tensor that no node makes.

    Attributes:
        trained: by default.
        reason: why not, if not.
        readers: operators that read it, looked at through reshapes and the like.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    reason: str = ""
    readers: tuple[str, ...] = ()


@dataclass
class Selection:
    """The trained leaves.

    Attributes:
        parameters: names of trained initializers, in order of first use.
        inputs: model inputs whose gradient is wanted.
        left_out: (name, reason) of every other floating initializer.
    """

    parameters: list[str]
    inputs: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)


def candidates(graph: gs.Graph, flow: Dataflow) -> list[Candidate]:
    """Every floating initializer with the default verdict."""
    consumers: dict[str, list[tuple[gs.Node, int]]] = {}
    frozen = {t.name for node in graph.nodes if getattr(node, FROZEN, False) for t in node.inputs}
    for node in every_node(graph):
        if getattr(node, FROZEN, False):
            continue
        for k, tensor in enumerate(node.inputs):
            if tensor.name:
                consumers.setdefault(tensor.name, []).append((node, k))
    active = set(flow.leaves)
    everything = ir.tensors(graph)
    order = [n for n in flow.leaves if isinstance(everything[n], gs.Constant)]
    order += [n for n, t in everything.items() if isinstance(t, gs.Constant) and n not in active]
    made = []
    for name in order:
        tensor = everything[name]
        if not dtypes.is_float(tensor) or (name in frozen and name not in consumers):
            continue  # constants of batch statistics and masks are the compiler's own
        uses = _uses(name, consumers)
        reason = _reason(tensor, uses, name in active, consumers)
        dtype = dtypes.np_dtype(tensor.dtype)
        made.append(
            Candidate(
                name, tuple(int(n) for n in tensor.shape), dtype.name if dtype else "", not reason, reason,
                tuple(node.op for node, _ in uses),
            )
        )  # fmt: skip
    return made


def _uses(name: str, consumers: dict[str, list[tuple[gs.Node, int]]]) -> list[tuple[gs.Node, int]]:
    """Who reads a tensor, looked at through operators that only move or cast it."""
    found: list[tuple[gs.Node, int]] = []
    seen = {name}
    stack = [name]
    while stack:
        for node, k in consumers.get(stack.pop(), ()):
            if (node.op in _MOVES and (k == 0 or node.op == "Concat")) or (k == 0 and _is_fake(node)):
                for out in node.outputs:
                    if out.name and out.name not in seen:
                        seen.add(out.name)
                        stack.append(out.name)
            else:
                found.append((node, k))
    return found


def _is_fake(node: gs.Node) -> bool:
    """Quantises or dequantises, and the gradient passes: fake quantisation moves nothing."""
    return (node.op == "QuantizeLinear" and dtypes.is_straight(node.outputs[0])) or (
        node.op == "DequantizeLinear" and dtypes.is_straight(node.inputs[0])
    )


def _reason(
    tensor: gs.Constant, uses: list[tuple[gs.Node, int]], active: bool, consumers: dict[str, list[tuple[gs.Node, int]]]
) -> str:
    """Why a tensor is left out; empty if it is trained."""
    rank, size = len(tensor.shape), int(np.prod(tensor.shape, dtype=np.int64))
    if any(node.op == "BatchNormalization" and k in (3, 4) for node, k in uses):
        return "running statistics of BatchNormalization"
    weighty = [(node, k) for node, k in uses if _is_weight(node, k)]
    if not weighty:
        for node, _ in uses:
            if node.op in _SERVANT:
                return f"{_SERVANT[node.op]}, vertex '{node.name}'"
        if not uses:
            return "read by no operator"
        cut = next((node for node, k in uses if node.op in _QUANTISED and k == 0), None)
        if cut is not None:
            return f"vertex '{cut.name or cut.outputs[0].name}' ({cut.op}) cuts the gradient"
        return f"read by {', '.join(sorted({node.op for node, _ in uses}))}, not as a weight"
    if not active:
        return "no gradient path to a trained output"
    if rank == 0:
        return "rank 0"
    if size == 0:
        return "no elements"
    if size == 1 and not any(_is_bias_or_slope(node, k, consumers) for node, k in weighty):
        return "one element, neither bias nor slope"
    return _mask(tensor, weighty)


def _is_weight(node: gs.Node, operand: int) -> bool:
    if node.op in _WEIGHTED:
        return True
    if node.op == "Gather":
        return operand == 0
    return node.op in ("Add", "Mul")


def _is_bias_or_slope(node: gs.Node, operand: int, consumers: dict[str, list[tuple[gs.Node, int]]]) -> bool:
    if node.op == "PRelu" or node.op in _RECURRENT or node.op in _NORMALIZATION:
        return operand > 0
    if node.op in _CONVOLUTION or node.op == "Gemm":
        return True
    if node.op == "Add":
        # A bias of one unit: added to what a product or convolution made.
        other = node.inputs[1 - operand] if operand < 2 else None
        maker = other.inputs[0] if other is not None and other.inputs else None
        if maker is not None and getattr(maker, PRECISION, False):
            maker = next(iter(maker.inputs[0].inputs), None)
        made = maker.op if maker is not None else ""
        return made in _PRODUCT or made in _CONVOLUTION
    return node.op in _PRODUCT


def _mask(tensor: gs.Constant, weighty: list[tuple[gs.Node, int]]) -> str:
    """A table of 0 and 1, or with values that stand for minus infinity.

    Fresh biases are all 0 and fresh scales all 1, so vectors, and operands that can only be weights, count as
    tables only if they mix both.
    """
    held = tensor._values
    if held.nbytes >= READ_LIMIT:
        return ""
    values = ir.values(tensor)
    if values.dtype.itemsize < 4:
        values = values.astype(np.float32)  # 1e30 does not fit into half precision
    if isinstance(held, ir.FilledValues):
        values = values.reshape(-1)[:1]
    with np.errstate(invalid="ignore"):
        if (np.abs(values) >= MASK_VALUE).any():
            return "a mask: values of 1e30 or more"
    if all(node.op in (_WEIGHTED - _PRODUCT) or (node.op == "Gemm" and k == 2) for node, k in weighty):
        return ""
    if not np.isin(values, (0.0, 1.0)).all():
        return ""
    table = sum(1 for n in tensor.shape if n > 1) >= 2
    mixed = bool((values == 0).any() and (values == 1).any())
    if mixed or (table and all(node.op in ("Add", "Mul") for node, _ in weighty)):
        return "a table of 0 and 1"
    return ""


def select(
    graph: gs.Graph,
    flow: Dataflow,
    *,
    wrt: Sequence[str] | None = None,
    freeze: Sequence[str] | None = None,
    where: str = "",
) -> Selection:
    """The trained leaves by the default rule, or those that ``wrt`` names; ``freeze`` takes parameters out.

    Raises:
        OptionError: a name or glob that matches nothing, or a leaf that no gradient reaches.
        ModelError: nothing is left to train.
    """
    found = candidates(graph, flow)
    by_name = {c.name: c for c in found}
    active = set(flow.leaves)
    floating_inputs = [t.name for t in graph.inputs if dtypes.is_float(t)]
    chosen: list[str] = []
    inputs: list[str] = []
    reasons = {c.name: c.reason for c in found if c.reason}
    if not wrt:
        chosen = [c.name for c in found if c.trained]
    else:
        everything = ir.tensors(graph)
        for pattern in wrt:
            if pattern in {t.name for t in graph.inputs}:
                if pattern not in floating_inputs:
                    raise OptionError(f"input '{pattern}' does not hold floating-point numbers", where="--wrt")
                if pattern not in active:
                    raise OptionError(
                        f"no gradient path from input '{pattern}' to a trained output", where="--wrt", hint=_cut(flow)
                    )
                inputs.append(pattern)
                continue
            exact = pattern in by_name
            matches = [pattern] if exact else [n for n in by_name if fnmatchcase(n, pattern)]
            live = [n for n in matches if n in active]
            if matches and not live:
                why = by_name[matches[0]].reason or "no gradient path to a trained output"
                raise OptionError(f"no gradient reaches '{matches[0]}': {why}", where="--wrt", hint=_cut(flow))
            if not matches:
                raise OptionError(_no_match(pattern, by_name, floating_inputs, everything), where="--wrt")
            chosen += live
        chosen = list(dict.fromkeys(chosen))
        inputs = list(dict.fromkeys(inputs))
        for c in found:
            if c.name not in chosen:
                reasons.setdefault(c.name, "not named by --wrt")
    for pattern in freeze or ():
        matches = [pattern] if pattern in by_name else [n for n in by_name if fnmatchcase(n, pattern)]
        if not matches:
            raise OptionError(_no_match(pattern, by_name, (), ir.tensors(graph)), where="--freeze")
        for name in matches:
            if name in chosen:
                chosen.remove(name)
                reasons[name] = f"frozen by --freeze {pattern}"
    if not chosen and not inputs:
        raise ModelError(
            "no parameter to train and no input gradient asked for",
            where=where,
            hint=_nothing(found, flow),
        )
    for name in chosen:
        reasons.pop(name, None)
    return Selection(chosen, inputs, [(n, r) for n, r in reasons.items() if n in by_name])


def _no_match(pattern: str, names: Sequence[str] | dict, inputs: Sequence[str], everything: dict) -> str:
    if pattern in everything:
        return f"'{pattern}' is not a floating-point parameter or input"
    near = difflib.get_close_matches(pattern, [*names, *inputs], n=3, cutoff=0.4)
    if not near:
        near = list(names)[:3]
    shown = f"; the nearest: {', '.join(near)}" if near else "; the model has none"
    return f"no parameter or input matches '{pattern}'{shown}"


def _cut(flow: Dataflow) -> str:
    """What cuts the gradient in a quantised model, and what helps; empty where nothing is quantised."""
    # Where --straight-through is given already, what is left is cut by something else.
    node = next((n for n in flow.graph.nodes if n.op in _QUANTISED and not dtypes.is_straight(n.outputs[0])), None)
    if node is None:
        return ""
    return (
        f"The model is quantised: vertex '{node.name or node.outputs[0].name}' ({node.op}) cuts the gradient. "
        "Train the floating-point model it was made from, or, if it is of QDQ format, add --straight-through."
    )


def _nothing(found: list[Candidate], flow: Dataflow) -> str:
    cut = _cut(flow)
    if cut:
        return cut
    if found:
        return "Floating tensors left out: " + ", ".join(f"{c.name} ({c.reason or 'frozen'})" for c in found[:4]) + "."
    return "The model has no floating-point initializer; --wrt INPUT gives the gradient of an input."
