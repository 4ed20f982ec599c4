"""The training graph's interface, as data and as model metadata (``zilc.signature``, a JSON document).

The schema ships with the package (``signature.schema.json``).  A program that knows only this document can train:
feed each ``next`` back under its ``name``.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import onnx

from zilc.errors import ModelError

KEY = "zilc.signature"
VERSION = 1


def schema() -> dict[str, Any]:
    """The JSON Schema of a signature (draft 2020-12)."""
    return json.loads(resources.files("zilc").joinpath("signature.schema.json").read_text("utf-8"))


def dumps(signature: dict[str, Any]) -> str:
    """The document as it stands in the metadata."""
    return json.dumps(signature, ensure_ascii=False, separators=(",", ":"))


def read(model: onnx.ModelProto, where: str = "model") -> dict[str, Any]:
    """The signature in a training graph's metadata.

    Raises:
        ModelError: the model is not a training graph, or a newer zilc wrote it.
    """
    for entry in model.metadata_props:
        if entry.key == KEY:
            found = json.loads(entry.value)
            if found.get("version") != VERSION:
                raise ModelError(
                    f"signature version {found.get('version')}, expected {VERSION}",
                    where=where,
                    hint="Emit the training graph again with this zilc.",
                )
            return found
    raise ModelError(
        "no 'zilc.signature' in its metadata: not a training graph",
        where=where,
        hint="Make one with 'zilc emit-training MODEL.onnx'.",
    )


def of_the_model(signature: dict[str, Any]) -> list[dict[str, str]]:
    """The entries of ``carried`` that the model itself holds: its running statistics, not the loss scale."""
    scale = signature.get("loss_scale") or {}
    return [c for c in signature["carried"] if c["name"] not in (scale.get("scale"), scale.get("good_steps"))]


def carried_pairs(signature: dict[str, Any]) -> list[tuple[str, str]]:
    """Every (name, next) that a step feeds back: parameters, slots, step and the rest."""
    pairs = [(p["name"], p["next"]) for p in signature["parameters"] if p["next"]]
    pairs += [(s["name"], s["next"]) for p in signature["parameters"] for s in p["state"]]
    if signature["step"]:
        pairs.append((signature["step"]["name"], signature["step"]["next"]))
    pairs += [(c["name"], c["next"]) for c in signature["carried"]]
    return pairs
