"""tools/profile_step.py: operations counted from shapes, and the page made of the measured rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import profile_step  # type: ignore[import-not-found]  # noqa: E402


@pytest.mark.parametrize(
    ("operator", "operands", "result", "count"),
    [
        ("Gemm", [[3, 5], [5, 7]], [3, 7], 2 * 3 * 5 * 7),
        ("Gemm", [[5, 3], [5, 7], [7]], [3, 7], 2 * 3 * 5 * 7),  # transA
        ("MatMul", [[4, 2, 3, 5], [5, 7]], [4, 2, 3, 7], 8 * 2 * 3 * 5 * 7),
        ("FusedMatMul", [[4, 3, 5], [1, 5, 7]], [4, 3, 7], 4 * 2 * 3 * 5 * 7),
        ("Conv", [[2, 6, 9, 9], [8, 3, 3, 3]], [2, 8, 7, 7], 2 * 2 * 8 * 49 * 27),  # two groups
        ("ConvTranspose", [[2, 8, 7, 7], [8, 3, 3, 3]], [2, 6, 9, 9], 2 * 2 * 8 * 49 * 27),
        ("Add", [[3, 5], [3, 5]], [3, 5], 0),
    ],
)
def test_operations(operator: str, operands: list[list[int]], result: list[int], count: int) -> None:
    shapes = [{"float": dims} for dims in operands]
    kernel = {"op_name": operator, "input_type_shape": shapes, "output_type_shape": [{"float": result}]}
    assert profile_step.operations(kernel) == pytest.approx(count)


def test_operations_with_a_constant_that_is_not_told() -> None:
    kernel = {"op_name": "Conv", "input_type_shape": [{"float": [1, 1, 8, 8]}],
              "output_type_shape": [{"float": [1, 16, 3, 3]}]}  # fmt: skip
    assert profile_step.operations(kernel, [[16, 1, 4, 4]]) == 2 * 16 * 9 * 16


def test_the_page_is_the_measured_rows() -> None:
    made = json.loads((ROOT / "docs" / "profile.json").read_text("utf-8"))
    assert profile_step.markdown(made["machines"]) == (ROOT / "docs" / "PROFILE.md").read_text("utf-8")


def test_kernels_of_a_step() -> None:
    found = profile_step.kernels("mlp3", 0.05)
    assert {"Gemm", "FusedGemm"} <= {kernel["operator"] for kernel in found}
    # Three products forward, three for the weights, two for the errors: 784, 128, 128, 10, a batch of 20; biases' sums.
    whole = 2 * 20 * (3 * (784 * 128 + 128 * 128 + 128 * 10) - 784 * 128 + 128 + 128 + 10)
    assert sum(kernel["operations"] for kernel in found) == pytest.approx(whole)


def test_machines_stand_beside_each_other(tmp_path: Path) -> None:
    """A new profile replaces that of its machine; a peer that was not measured has an empty place."""
    def made(machine: str, ms: float, **peers: float) -> dict[str, object]:
        entry = {
            "network": "mlp3", "ms": ms, "nodes": 1, "gflop": 1.0, "rate": 1.0, "share": 0.5, "peers": peers,
            "groups": {**dict.fromkeys(profile_step.GROUPS, 0.0), "products": 1.0, profile_step.REST: 1.0},
            "slowest": [{"operator": "Gemm", "name": "g", "us": 1000.0}],
        }  # fmt: skip
        facts = {"date": "2026-01-01", "machine": machine, "Python": "3", "onnxruntime": "1", "torch": "2"}
        return {"facts": facts, "best": 9.0, "rows": [entry], "tried": {"sum": {"one way": ms}}}

    for one in (made("Xeon", 3.0), made("EPYC", 5.0, torch=4.0), made("Xeon", 7.0, torch=2.0)):
        profile_step.write(one, tmp_path)
    page = (tmp_path / "PROFILE.md").read_text()
    assert page.index("## Xeon") < page.index("## EPYC")
    assert "| mlp3 | 7 | 2 | 1 | 1 | 0 | 0 | 1 | 1 | 1 | 50% | 0.50 |  |  |" in page
    assert "| sum | one way | 7 | 5 |" in page
    assert "| 3 |" not in page
