"""Which operators of ONNX's default domain zilc differentiates, and how: what ``zilc ops`` tells."""

from __future__ import annotations

from typing import Any

import onnx.defs

import zilc.vjp  # noqa: F401  (fills the table)
from zilc.onnx_io import MAX_OPSET
from zilc.passes.sequences import OPERATORS as SEQUENCES
from zilc.vjp.table import TABLE

#: How a cotangent passes an operator; the order is that of the summary.
STATUSES = {
    "rule": "a VJP rule in the table",
    "function body": "derived from the operator's function body",
    "control flow": "an operator with subgraphs",
    "taken apart": "replaced by its tensors before levels are found, where its content is known",
    "no gradient": "nothing flows through it",
    "missing": "an error on a path to a trained leaf",
    "deprecated": "replaced when a model is raised to opset 18",
}
_FLOATS = ("tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)")


def operators(opset: int = MAX_OPSET) -> dict[str, Any]:
    """Every operator of the default domain at ``opset``, its status, and the opsets from which rules are written."""
    newest: dict[str, onnx.defs.OpSchema] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= opset:
            held = newest.get(schema.name)
            if held is None or held.since_version < schema.since_version:
                newest[schema.name] = schema
    rows = [_row(schema, opset) for _, schema in sorted(newest.items())]
    counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
    return {"opset": opset, "operators": rows, "counts": counts, "meaning": dict(STATUSES)}


def _row(schema: Any, opset: int) -> dict[str, Any]:
    rule = TABLE.lookup(schema.name, opset)
    since = sorted(r.since for r in TABLE.rules.get(("", schema.name), ()))
    note = rule.note if rule is not None else ""
    if schema.deprecated:
        status, note = "deprecated", note or STATUSES["deprecated"]
    elif schema.name in SEQUENCES:
        status, note = "taken apart", note or STATUSES["taken apart"]
    elif rule is not None:
        status = "rule" if rule.differentiable else "no gradient"
    elif any(a.type == onnx.defs.OpSchema.AttrType.GRAPH for a in schema.attributes.values()):
        status, note = "control flow", "no rule: carries no gradient to a trained leaf"
    elif schema.has_function or schema.has_context_dependent_function:
        floating = any(_may_float(operand) for operand in schema.inputs)
        status = "function body" if floating else "no gradient"
        note = "" if floating else "no floating operand"
    else:
        status = "missing"
    return {"operator": schema.name, "status": status, "since": since, "note": note}


def _may_float(operand: Any) -> bool:
    return any(kind in _FLOATS for kind in operand.types)
