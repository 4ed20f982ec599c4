"""zilc: any ONNX model in, one exact predictive-coding (Z-IL) training step in standard ONNX operators out.

The public names load when they are used, so ``import zilc`` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zilc.certificate import Certificate, certify
    from zilc.errors import (
        DataError,
        EnsuresError,
        FileError,
        MissingRule,
        ModelError,
        OptionError,
        RequiresError,
        RuntimeMissing,
        ZilcError,
    )
    from zilc.pipeline import Levelized, TrainingStep, emit_training, levelize
    from zilc.runtime import Trainer
    from zilc.tracing import Trace, trace
    from zilc.verification import verify

_HOME = {
    "levelize": "zilc.pipeline",
    "emit_training": "zilc.pipeline",
    "Levelized": "zilc.pipeline",
    "TrainingStep": "zilc.pipeline",
    "verify": "zilc.verification",
    "certify": "zilc.certificate",
    "Certificate": "zilc.certificate",
    "trace": "zilc.tracing",
    "Trace": "zilc.tracing",
    "Trainer": "zilc.runtime",
    "ZilcError": "zilc.errors",
    "ModelError": "zilc.errors",
    "MissingRule": "zilc.errors",
    "OptionError": "zilc.errors",
    "DataError": "zilc.errors",
    "FileError": "zilc.errors",
    "RuntimeMissing": "zilc.errors",
    "RequiresError": "zilc.errors",
    "EnsuresError": "zilc.errors",
}

__all__ = [
    "Certificate",
    "DataError",
    "EnsuresError",
    "FileError",
    "Levelized",
    "MissingRule",
    "ModelError",
    "OptionError",
    "RequiresError",
    "RuntimeMissing",
    "Trace",
    "Trainer",
    "TrainingStep",
    "ZilcError",
    "certify",
    "emit_training",
    "levelize",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("zilc")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'zilc' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
