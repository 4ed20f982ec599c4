"""Pools: every attribute, overlapping and disjoint windows, ties, static and symbolic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.vjp.cases import Case, both, check, label
from zilc.testing import op_model, run, vjp_model


def _r(*shape: int) -> np.ndarray:
    """Distinct values at least 0.05 apart and from 0, so that no step crosses a tie or a kink."""
    n = int(np.prod(shape))
    values = (np.arange(n) + 1) * 0.05 * np.where(np.arange(n) % 2, -1, 1)
    return np.random.default_rng([7, *shape]).permutation(values).reshape(shape)


def _case(op: str, shape: tuple, label: str = "", opset: int = 18, **attrs: Any) -> Case:
    return Case(op, [_r(*shape)], attrs, opset=opset, label=label)


# Where strides and dilations are 1, ONNX's reference evaluator takes 2-D pads in the order top, bottom, left,
# right, so these pads are symmetric; on one axis or three it takes no pads at all.
MAX = [
    _case("MaxPool", (2, 3, 8), kernel_shape=[3], strides=[2]),
    _case("MaxPool", (2, 2, 8, 7), kernel_shape=[2, 2], strides=[2, 2], label="disjoint"),
    _case("MaxPool", (2, 2, 8, 7), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], label="overlapping"),
    _case("MaxPool", (1, 2, 8, 7), kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1], label="asymmetric"),
    _case("MaxPool", (1, 2, 7, 7), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, label="ceil"),
    _case("MaxPool", (1, 2, 8, 6), kernel_shape=[3, 2], strides=[2, 3], ceil_mode=1, pads=[1, 1, 1, 1], label="ceil pads"),
    _case("MaxPool", (1, 2, 8, 9), kernel_shape=[2, 3], dilations=[2, 3], strides=[1, 2], label="dilations"),
    _case("MaxPool", (1, 2, 6, 7), kernel_shape=[2, 3], dilations=[2, 2], label="dilations stride 1"),
    _case("MaxPool", (2, 2, 5, 6), kernel_shape=[3, 2], label="stride 1"),
    _case("MaxPool", (1, 2, 5, 6), kernel_shape=[3, 3], pads=[1, 1, 1, 1], label="stride 1 pads"),
    _case("MaxPool", (2, 2, 6, 5), kernel_shape=[3, 2], strides=[2, 2], storage_order=1, label="column major"),
    _case("MaxPool", (1, 2, 8, 6), kernel_shape=[2, 2], strides=[2, 2], auto_pad="VALID", label="valid"),
    _case("MaxPool", (1, 2, 8, 7), kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER", label="same upper"),
    _case("MaxPool", (1, 2, 4, 4, 5), kernel_shape=[2, 3, 2], strides=[2, 1, 2], label="3d"),
]
AVERAGE = [
    _case("AveragePool", (2, 3, 8), kernel_shape=[3], strides=[2]),
    _case("AveragePool", (2, 3, 9), kernel_shape=[3], strides=[2], pads=[1, 1], count_include_pad=1),
    _case("AveragePool", (2, 2, 8, 6), kernel_shape=[2, 3], strides=[2, 3], label="tiles"),
    _case("AveragePool", (2, 2, 9, 7), kernel_shape=[2, 3], strides=[2, 3], label="tiles leave a rest"),
    _case("AveragePool", (1, 2, 7, 6), kernel_shape=[2, 2], strides=[2, 2], pads=[1, 0, 0, 1], label="padded tiles"),
    _case("AveragePool", (1, 2, 7, 6), kernel_shape=[3, 3], strides=[2, 1], pads=[1, 1, 1, 1], label="pads"),
    _case("AveragePool", (1, 2, 7, 6), kernel_shape=[3, 2], pads=[1, 0, 2, 1], count_include_pad=1, label="include"),
    _case("AveragePool", (1, 2, 8, 7), kernel_shape=[1, 2], strides=[3, 3], label="gaps"),
    _case("AveragePool", (1, 2, 7, 8), kernel_shape=[2, 2], strides=[1, 2], dilations=[2, 3], opset=19, label="dilations"),
    _case("AveragePool", (1, 2, 6, 8), kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER", label="same upper"),
    _case("AveragePool", (1, 2, 6, 8), kernel_shape=[3, 3], strides=[2, 1], auto_pad="SAME_LOWER", label="same lower"),
    _case("AveragePool", (1, 2, 6, 8), kernel_shape=[3, 3], strides=[2, 1], auto_pad="VALID", label="valid"),
    _case("AveragePool", (1, 2, 4, 5, 4), kernel_shape=[2, 2, 3], strides=[1, 2, 1], label="3d"),
]
LP = [
    _case("LpPool", (2, 2, 6, 7), kernel_shape=[3, 2], strides=[1, 2]),
    _case("LpPool", (1, 2, 6, 7), kernel_shape=[3, 2], strides=[3, 2], p=1, label="p1"),
    _case("LpPool", (1, 2, 6, 7), kernel_shape=[2, 2], strides=[2, 2], p=3, label="p3"),
    _case("LpPool", (1, 2, 6), kernel_shape=[2], p=4, label="p4"),
    _case("LpPool", (1, 2, 6, 7), kernel_shape=[2, 2], dilations=[2, 1], label="dilations"),
]
GLOBAL = [
    _case("GlobalAveragePool", (2, 3, 4, 5)),
    _case("GlobalAveragePool", (2, 3, 4)),
    _case("GlobalAveragePool", (2, 2, 2, 3, 2)),
    _case("GlobalMaxPool", (2, 3, 4, 5)),
]


def _lp(shape: tuple, p: int) -> Case:
    # Not in the reference evaluator; float32 in ONNX Runtime, checked against PyTorch below.
    return Case("GlobalLpPool", [_r(*shape).astype(np.float32)], {"p": p}, executor="onnxruntime", label=f"p{p}")


RUNTIME = [_lp((2, 3, 4, 5), 2), _lp((2, 3, 4), 1), _lp((1, 2, 2, 3, 2), 3)]
CASES: list[Case] = MAX + AVERAGE + LP + GLOBAL


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_against_central_differences(case: Case, symbolic: bool) -> None:
    check(case, symbolic)
