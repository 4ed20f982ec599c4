"""The VJP rules.  Importing this package fills the table (:mod:`zilc.vjp.table`)."""

from zilc.vjp import (
    attention,
    composite,
    constant,
    conv,
    elementwise,
    indexing,
    linear,
    norm,
    pool,
    reduce,
    resize,
    shape,
)

__all__ = [
    "attention",
    "composite",
    "constant",
    "conv",
    "elementwise",
    "indexing",
    "linear",
    "norm",
    "pool",
    "reduce",
    "resize",
    "shape",
]
