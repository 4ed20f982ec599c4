"""Emitted nodes against the document of ONNX Runtime's CUDA kernels, and how that document is read."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

import zilc
from zilc import ir, models
from zilc.emit import Emitter
from zilc.testing import run


def _tool() -> Any:
    path = Path(__file__).parent.parent / "tools" / "cuda_kernels.py"
    spec = importlib.util.spec_from_file_location("cuda_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool = _tool()
KERNELS = tool.Kernels.load()

#: The benchmark's networks, narrower: a vocabulary stays, for its size decides how an embedding learns.
NARROW: dict[str, dict[str, Any]] = {
    "mlp3": {},
    "rnn": {"steps": 3},
    "alexnet": {"width": 8, "hidden": 32},
    "resnet18": {"width": 8},
    "transformer": {"d_model": 16, "d_ff": 32, "heads": 2},
    "decoder": {"d_model": 16, "heads": 2, "layers": 2},
}

DOCUMENT = """
## Operators implemented by CPUExecutionProvider

| Op Name | Parameters | OpSet Version | Types Supported |
|---------|------------|---------------|-----------------|
|**Operator Domain:** *ai.onnx*||||
|Det|*in* X:**T**<br> *out* Y:**T**|11+|**T** = tensor(float)|
| |
| |

## Operators implemented by CUDAExecutionProvider

| Op Name | Parameters | OpSet Version | Types Supported |
|---------|------------|---------------|-----------------|
|**Operator Domain:** *ai.onnx*||||
|Add|*in* A:**T**<br> *in* B:**T**<br> *out* C:**T**|14+|**T** = tensor(double), tensor(float), tensor(int64)|
|||13|**T** = tensor(float)|
|||[7, 12]|**T** = tensor(float16)|
|Pad|*in* data:**T**<br> *in* pads:**tensor(int64)**<br> *in* axes:**Tind**<br> *out* output:**T**<br><br>or<br><br>*in* data:**T**<br> *out* output:**T**|18+|**T** = tensor(float)|
|Reshape|*in* data:**T**<br> *in* shape:**tensor(int64)**<br> *out* reshaped:**T**|13+|**T** = tensor(float)<br/> **shape** = tensor(int64)|
|Shape|*in* data:**T**<br> *out* shape:**T1**|15+|**T** = seq(tensor(int8)), tensor(float)<br/> **T1** = tensor(int64)|
| |
| |
|**Operator Domain:** *com.microsoft*||||
|Gelu|*in* X:**T**<br> *out* Y:**T**|1+|**T** = tensor(float)|
"""  # noqa: E501


@pytest.fixture(scope="module")
def read() -> Any:
    return tool.Kernels({"source": "", "onnxruntime": "", "kernels": tool.parse(DOCUMENT)})


# -- the document --


def test_a_section_is_read_by_operator_version_and_type() -> None:
    kernels = tool.parse(DOCUMENT)
    assert sorted(kernels) == ["Add", "Pad", "Reshape", "Shape"]  # neither the CPU's nor another domain's
    assert [(k["since"], k["until"]) for k in kernels["Add"]] == [(14, None), (13, 13), (7, 12)]
    assert kernels["Add"][0]["types"] == {"T": ["double", "float", "int64"]}
    assert kernels["Add"][1]["in"] == [["A", "T"], ["B", "T"]]  # a row without parameters has those above
    assert kernels["Shape"][0]["types"] == {"T": ["seq(tensor(int8))", "float"], "T1": ["int64"]}
    assert kernels["Shape"][0]["out"] == [["shape", "T1"]]
    # Of an operator's forms, the one with all its operands: an axis' dtype is not the data's.
    assert kernels["Pad"][0]["in"] == [["data", "T"], ["pads", "int64"], ["axes", "Tind"]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("CUDAExecutionProvider", "OtherProvider", "no section"),
        ("|14+|", "|from 14|", "range of versions"),
        ("|14+|**T** = ", "|14+|T: ", "list of types"),
        ("|14+|", "|14+||", "5 cells"),
    ],
)
def test_what_is_not_understood_is_an_error(old: str, new: str, message: str) -> None:
    """A row skipped in silence would be a kernel that is not there, or a lack that goes unseen."""
    with pytest.raises(ValueError, match=message):
        tool.parse(DOCUMENT.replace(old, new))


def test_a_node_is_looked_up_by_version_and_types(read: Any) -> None:
    assert read.why_none("Add", 18, ["float", "float"], ["float"]) == ""
    assert read.why_none("Add", 18, ["int32", "int32"], ["int32"]) == "no kernel with A of int32"
    assert read.why_none("Add", 12, ["float16", "float16"], ["float16"]) == ""
    assert read.why_none("Det", 18, ["float"], ["float"]) == "no kernel of any version or type"
    assert read.why_none("Reshape", 18, ["float", "int64"], ["float"]) == "no kernel of version 14"  # 13+ is 13 alone
    assert read.why_none("Pad", 18, ["float", "int64", None, "int64"], ["float"]) == ""
    assert read.why_none("Shape", 18, ["float"], ["int64"]) == ""
    assert read.why_none("Add", 18, ["float", tool.UNKNOWN], ["float"]) == "no kernel with B of unknown type"


def test_what_shapes_alone_decide_stays_on_the_host(read: Any) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[N] x, int64[1] k) => (int64[1] twice, float[N] y, float[1] d) {
            shape = Shape(x)
            twice = Add(shape, shape)
            total = ReduceProd(shape)
            y = Add(x, x)
            d = Det(y)
        }"""
    )
    found = tool.places(model, read)
    assert [f.place for f in found] == ["cuda", "host", "shape", "cuda", "none"]
    assert found[-1].reason == "no kernel of any version or type"


# -- zilc's graphs --


def _lacking(name: str, optimizer: str = "sgd", opset: int = 18, **how: Any) -> list[str]:
    model = zilc.emit_training(
        models.build(name, opset=opset, **NARROW[name]), loss="cross-entropy", optimizer=optimizer, **how
    ).model
    found = tool.examine(model, KERNELS)
    assert {f.role for f in found} >= {"forward", "error", "update", "loss"}
    return sorted({f"{f.op}: {f.reason}" for f in found if f.place == "none" and f.emitted})


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", tool.NETWORKS)
def test_no_emitted_node_lacks_a_kernel(name: str, optimizer: str) -> None:
    assert _lacking(name, optimizer) == []


@pytest.mark.parametrize("name", ["mlp3", "resnet18", "transformer"])
def test_no_emitted_node_lacks_a_kernel_in_mixed_precision(name: str) -> None:
    assert _lacking(name, "adam", precision="float16") == []


def test_no_emitted_node_lacks_a_kernel_in_training_mode() -> None:
    assert _lacking("resnet18", mode="train") == []


@pytest.mark.parametrize("name", ["mlp3", "transformer"])
def test_no_emitted_node_lacks_a_kernel_at_opset_22(name: str) -> None:
    """Size and Flatten have none from opset 19 and 21 on: other operators stand for them there."""
    assert _lacking(name, opset=22) == []


def test_the_page_is_that_of_the_results() -> None:
    results = json.loads(tool.JSON.read_text(encoding="utf-8"))
    assert tool.MARKDOWN.read_text(encoding="utf-8") == tool.markdown(results)
    assert results["source"] == KERNELS.source
    written = [(row["network"], row["optimizer"], row["options"]) for row in results["networks"]]
    assert written == list(tool.variants())


# -- what stands for operators without kernels --


@pytest.mark.parametrize("opset", [18, 22])
@pytest.mark.parametrize(
    "shape", [["a", "b", "c"], [2, "b", "c"], ["a", "b", 4], ["a", 3, 4], [2, 3, 4], [2, 0, "c"], [2, "b", 0]]
)
@pytest.mark.parametrize("axis", [1, 2])
def test_a_matrix_and_a_size_at_any_opset(shape: list[int | str], axis: int, opset: int) -> None:
    graph = gs.Graph(opset=opset)
    op = Emitter(graph)
    x = gs.Variable("x", np.float32, shape)
    value = np.zeros([n if isinstance(n, int) else 2 + k for k, n in enumerate(shape)], np.float32)
    value.reshape(-1)[:] = np.arange(value.size)
    made = [op.as_matrix(x, axis), op.size_of(x), op.count(x, np.int64)]
    graph.inputs = [x]
    graph.outputs = [op.Identity(t) for t in made]
    for t, rank, kind in zip(graph.outputs, (2, 1, 0), (np.float32, np.int64, np.int64), strict=True):
        t.dtype, t.shape = kind, [None] * rank
    assert opset == 18 or not {"Flatten", "Size"} & {node.op for node in graph.nodes}
    matrix, size, count = run(ir.to_proto(graph), {"x": value}, "onnxruntime")
    sides = int(np.prod(value.shape[:axis])), int(np.prod(value.shape[axis:]))
    np.testing.assert_array_equal(matrix, value.reshape(sides))
    assert size.tolist() == [value.size]
    assert count == value.size
