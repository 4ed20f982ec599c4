"""VJP rules of operators that move elements, against central differences."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from tests.vjp.cases import Case, both, check, label
from tests.vjp.single import check_float32
from zilc import ir
from zilc.emit import Emitter
from zilc.testing import op_model, run, vjp_model
from zilc.vjp import table

_rng = np.random.default_rng(11)


def r(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape)


def i(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def distinct(*shape: int) -> np.ndarray:
    """Values far apart, in random order."""
    return _rng.permutation(int(np.prod(shape))).reshape(shape) * 0.1 - 0.5


_VIEWS = [
    *(
        Case("Reshape", [r(*shape), i(*to)], attrs, opset=opset, constant=c, symbolic=bool(c), label=f"{to}")
        for opset in (18, 25)
        for c in ([], [1])
        for shape, to, attrs in [
            ((2, 3, 4), (6, 4), {}), ((2, 3, 4), (0, -1), {}), ((2, 3), (3, 2), {}), ((6,), (2, -1, 1), {}),
            ((2, 3, 4), (-1,), {"allowzero": 1}),
        ]
    ),
    *(Case("Reshape", [r(0, 3), i(3, 0)], {"allowzero": 1}, constant=c, symbolic=bool(c)) for c in ([], [1])),
    Case("Reshape", [r(1), np.asarray([], np.int64)], constant=[1]),
    Case("Reshape", [r(), i(1, 1)], constant=[1]),
    *(Case("Transpose", [r(2, 3, 4)], {"perm": list(p)}) for p in [(2, 0, 1), (1, 2, 0), (0, 1, 2), (0, 2, 1)]),
    Case("Transpose", [r(2, 3, 4)]),
    Case("Transpose", [r(3)]),
    *(Case("Flatten", [r(2, 3, 4)], {"axis": a}) for a in (0, 1, 2, 3, -1, -3)),
    Case("Flatten", [r(5)]),
    Case("Squeeze", [r(1, 3, 1, 2), i(0, -2)], constant=[1]),
    Case("Squeeze", [r(1, 3, 1, 2)], symbolic=False),
    Case("Squeeze", [r(1, 1)], opset=25, symbolic=False),
    Case("Unsqueeze", [r(3, 2), i(0, -1)], constant=[1]),
    Case("Unsqueeze", [r(), i(0)], constant=[1]),
    *(
        Case("Expand", [r(*a), i(*b)], constant=c, symbolic=bool(c), label=f"{b}")
        for c in ([], [1])
        for a, b in [
            ((3, 1), (2, 1, 4)), ((1,), (3,)), ((2, 3), (1, 3)), ((), (2, 2)), ((2, 3), (2, 3)), ((1, 3), (0, 3)),
        ]
    ),
    *(
        Case("Tile", [r(*a), i(*b)], constant=c, label=f"{b}")
        for c in ([], [1])
        for a, b in [((2, 3), (2, 1)), ((2, 3), (1, 1)), ((3,), (4,)), ((2, 1, 2), (1, 3, 2)), ((2, 3), (0, 2))]
    ),
]  # fmt: skip

_JOINS = [
    Case("Concat", [r(2, 3), r(2, 1), r(2, 4)], {"axis": 1}, operands=[0, 1, 2]),
    Case("Concat", [r(2, 3), r(1, 3)], {"axis": -2}, operands=[0, 1]),
    Case("Concat", [r(2, 3)], {"axis": 0}),
    Case("Concat", [r(0, 3), r(2, 3)], {"axis": 0}, operands=[0, 1]),
    Case("Concat", [r(2, 3, 2), r(2, 3, 1)], {"axis": 2}, operands=[0, 1]),
    Case("Split", [r(6, 2), i(1, 2, 3)], {"axis": 0}, outputs=3, constant=[1]),
    Case("Split", [r(2, 6), i(4, 2)], {"axis": -1}, outputs=2, constant=[1]),
    Case("Split", [r(2, 7)], {"axis": 1, "num_outputs": 3}, outputs=3),
    Case("Split", [r(4)], {"num_outputs": 2}, outputs=2),
    Case("Split", [r(4), i(4)], outputs=1, constant=[1]),
    Case("Split", [r(4, 2), i(4, 0)], outputs=2, constant=[1]),
]

_SLICES = [
    *(
        Case("Slice", [r(*shape), *(None if p is None else i(*p) for p in parts)], constant=c, label=f"{parts}")
        for shape, parts in [
            ((5, 4), ((1,), (3,))),
            ((5, 4), ((1, 0), (4, 2))),
            ((5, 4), ((1,), (3,), (1,))),
            ((5, 4), ((-3,), (-1,), (-1,))),
            ((5, 4), ((0,), (2**62,), (0,))),
            ((5, 4), ((-100,), (100,), (0,))),
            ((5, 4), ((1, 1), (100, 3), (-1, 0), (1, 1))),
            ((7, 4), ((0,), (7,), (0,), (2,))),
            ((7, 4), ((1,), (100,), (0,), (3,))),
            ((7, 4), ((-1,), (-100,), (0,), (-1,))),
            ((7, 4), ((5, 3), (0, -100), (0, 1), (-2, -3))),
            ((7, 4), ((100,), (2,), (0,), (-3,))),
            ((5, 4), ((3,), (3,), (0,))),
            ((2, 3, 6), ((1,), (6,), (2,), (2,))),
            ((5, 4), ((1,), (3,), None, (1,))),
        ]
        # all parts known; axes and steps known; nothing known
        for c in ([k for k in range(1, 5) if parts[k - 1 : k] not in ((), (None,))],
                  [k for k in (3, 4) if parts[k - 1 : k] not in ((), (None,))], [])
    ),
]  # fmt: skip

_PADS = [
    *(
        Case("Pad", [r(*shape), i(*pads), value, axes], {"mode": "constant"}, constant=c, label=f"{pads}",
             executor="onnxruntime" if min(pads) < 0 else "reference")
        for c in ([3], [1, 3])
        for shape, pads, value, axes in [
            ((2, 3), (1, 0, 0, 2), None, None),
            ((2, 3), (1, 0, 0, 2), np.asarray(0.5), None),
            ((2, 3), (0, 0, 0, 0), np.asarray(0.5), None),
            ((4, 5), (-1, 1, 2, -2), np.asarray(0.5), None),
            ((2, 3), (2, 1), np.asarray(-1.0), i(-1)),
            ((2, 3, 4), (1, 1, 0, -1), None, i(0, 2)),
        ]
    ),
    *(
        Case("Pad", [r(*shape), i(*pads), None, axes], {"mode": mode}, opset=opset, constant=c, label=f"{mode}{pads}")
        for opset, modes in ((18, ("reflect", "edge")), (19, ("wrap",)), (25, ("reflect", "edge", "wrap")))
        for mode in modes
        for c in ([1, 3], [3])
        for shape, pads, axes in [
            ((4, 3), (2, 1, 3, 0), None),
            ((2, 4), (2, 1), i(-1)),
            ((2, 2, 5), (1, 0, 0, 4), i(0, 2)),
        ]
    ),
]  # fmt: skip

_REARRANGED = [
    *(Case("DepthToSpace", [r(2, 12, 2, 3)], {"blocksize": 2, "mode": m}) for m in ("DCR", "CRD")),
    Case("SpaceToDepth", [r(2, 3, 4, 6)], {"blocksize": 2}),
    *(Case("Trilu", [r(3, 4), *k], {"upper": u}) for u in (0, 1) for k in ([], [np.asarray(1)], [np.asarray(-1)])),
    Case("Trilu", [r(2, 3, 3)]),
    Case("ReverseSequence", [r(4, 3, 2), i(1, 4, 2)], {"time_axis": 0, "batch_axis": 1}),
    Case("ReverseSequence", [r(3, 4), i(1, 4, 2)], {"time_axis": 1, "batch_axis": 0}),
]

_GATHERS = [
    *(
        Case("Gather", [r(*shape), np.asarray(index, np.int64)], {"axis": axis}, constant=c, label=f"{index}@{axis}")
        for c in ([], [1])
        for shape, index, axis in [
            ((4, 3), [0, 2, 2, -1], 0), ((4, 3), [[0, 1], [1, 3]], 0), ((4, 3), 2, 0), ((4, 3), -1, 1),
            ((5,), [1, 1], 0),
            ((2, 4, 3), [[3, 0, 3]], 1), ((2, 4, 3), [2, 2], -1), ((2, 4, 3), 0, 1), ((2, 4, 3), [1, 2], 1),
            ((2, 4, 3), [[1], [2]], -2), ((2, 4, 3), [-2, -1], 1), ((4, 3), [0, 1, 2, 3], 0), ((2, 4, 3), [-1, 0], 1),
            ((200, 3), [7, 7, 199, -1], 0), ((200, 2, 3), [[7, 7, 0], [199, -1, 0]], 0),
            ((130,), [[5, 5], [0, -130]], 0),
            ((3, 2, 2), [[2, 0], [2, 1]], 0), ((4, 3), [], 0),
        ]
    ),
    *(
        # the reference wants index tensors as large as the data
        Case("GatherElements", [r(*shape), np.asarray(index, np.int64)], {"axis": axis}, executor="onnxruntime")
        for shape, index, axis in [
            ((3, 4), [[0, 0, 3], [1, -1, 1]], 1), ((3, 4), [[0, 2, 0, -1], [0, 1, 0, 0]], 0), ((3,), [1, 1, 1], -1),
        ]
    ),
    *(
        Case("GatherND", [r(*shape), np.asarray(index, np.int64)], {"batch_dims": b}, constant=c, symbolic=bool(c),
             label=f"b{b}")
        for c in ([], [1])
        for shape, index, b in [
            ((3, 4), [[0, 1], [2, 3], [0, 1], [-1, -1]], 0),
            ((3, 4), [[1], [1], [-1]], 0),
            ((3, 4, 2), [[[0, 1]], [[2, -3]]], 0),
            ((2, 3, 4), [[1], [-1]], 1),
            ((2, 3, 4), [[[1, 0], [1, 0]], [[2, -1], [0, 3]]], 1),
            ((2, 2, 3), [[[1], [2]], [[0], [0]]], 2),
            ((3,), [[1], [1]], 0),
            ((2, 2, 3, 2), [[[[1]], [[2]]], [[[0]], [[-1]]]], 2),
        ]
    ),
]  # fmt: skip

_SCATTERS = [
    *(
        Case("ScatterElements",
             [distinct(3, 4) + 0.01, np.asarray(index, np.int64), distinct(*np.shape(index)) * 2 + 0.003],
             {"reduction": how, "axis": axis}, operands=[0, 2], label=how, executor="onnxruntime")
        for how, index, axis in [
            ("none", [[1, 0, -1], [2, 3, 0]], 1), ("none", [[1, 0, 2, 1]], 0), ("add", [[1, 1, 1], [2, 3, -1]], 1),
            ("mul", [[1, 1, 1], [2, 3, -1]], 1), ("max", [[1, 1, 1], [2, 3, -1]], 1),
            ("min", [[1, 1, 1], [2, 3, -1]], -1),
        ]
    ),
    Case("ScatterElements", [np.asarray([2.0, 3, 0, 5]), i(0, 0, 1, 1, 2, 3), np.asarray([0.0, 4, 0, 0, 3, 2])],
         {"reduction": "mul"}, operands=[0, 2], label="mul zeros"),
    *(
        Case("ScatterND", [distinct(3, 4) + 0.01, np.asarray(index, np.int64), distinct(*shape) * 2 + 0.003],
             {"reduction": how}, operands=[0, 2], label=how)
        for how, index, shape in [
            ("none", [[1], [-1]], (2, 4)), ("none", [[1, 0], [2, 3]], (2,)), ("add", [[1], [1], [0]], (3, 4)),
            ("add", [[[1, 1]], [[0, -1]]], (2, 1)), ("mul", [[1], [1]], (2, 4)), ("max", [[1], [1]], (2, 4)),
            ("min", [[1, 2], [1, 2], [0, 0]], (3,)),
        ]
    ),
]  # fmt: skip

_SELECTED = [
    *(
        Case("TopK", [distinct(3, 5), i(k)], {"axis": axis, "largest": largest}, outputs=2, constant=c, opset=opset)
        for opset in (18, 24)
        for c in ([], [1])
        for k, axis, largest in [(2, -1, 1), (3, 0, 0), (1, 1, 1)]
    ),
    Case("Compress", [r(3, 4), np.asarray([True, False, True])], {"axis": 0}),
    Case("Compress", [r(3, 4), np.asarray([False, True])], {"axis": -1}),
    Case("Compress", [r(3, 4), np.asarray([False, True, True, False, True])]),
    Case("Compress", [r(2, 3, 2), np.asarray([False, True, True])], {"axis": 1}),
]

CASES = [*_VIEWS, *_JOINS, *_SLICES, *_PADS, *_REARRANGED, *_GATHERS, *_SCATTERS, *_SELECTED]


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_vjp(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_in_onnxruntime(case: Case) -> None:
    check_float32(case)


def _emitted(
    op: str, shapes: list[list[int | str] | np.ndarray], attrs: dict | None = None, outputs: int = 1
) -> list[str]:
    """Operators that the VJP of one node takes, its operands floats of these shapes or constants."""
    names = [f"x{k}" for k in range(len(shapes))]
    infos, constants = [], []
    for name, shape in zip(names, shapes, strict=True):
        if isinstance(shape, np.ndarray):
            constants.append(onnx.numpy_helper.from_array(shape, name))
        else:
            infos.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    results = [f"y{k}" for k in range(outputs)]
    node = onnx.helper.make_node(op, names, results, name="node", **(attrs or {}))
    ends = [onnx.helper.make_empty_tensor_value_info(y) for y in results]
    graph = onnx.helper.make_graph([node], "op", infos, ends, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    made = vjp_model(onnx.shape_inference.infer_shapes(model, data_prop=True))
    return [n.op_type for n in made.graph.node if n.name.startswith("zilc")]


def test_symbolic_batch_and_length_need_no_shape_nodes() -> None:
    """What transformers are made of: [batch, sequence, hidden] with the first two symbolic."""
    hidden: list[int | str] = ["b", "s", 768]
    assert _emitted("Reshape", [hidden, i(0, 0, 12, 64)]) == ["Reshape"]
    assert _emitted("Reshape", [["b", "s", 12, 64], i(0, 0, 768)]) == ["Reshape"]
    assert _emitted("Slice", [hidden, i(256), i(512), i(2)]) == ["Pad"]
    assert _emitted("Split", [hidden], {"axis": 2, "num_outputs": 3}, outputs=3) == ["Concat"]
    assert _emitted("Concat", [["b", 1, 768], ["b", 196, 768]], {"axis": 1}) == ["Slice", "Slice"]
    assert _emitted("Flatten", [["b", 512, 7, 7]], {"axis": 1}) == ["Reshape"]
    assert _emitted("Transpose", [["b", "s", 12, 64]], {"perm": [0, 2, 1, 3]}) == ["Transpose"]


def test_repeated_rows_of_an_embedding_are_all_added() -> None:
    """onnxruntime's ScatterND adds in parallel without atomics and loses summands; nothing of it may be emitted."""
    index = np.random.default_rng(0).integers(0, 3, 20_000)
    table_ = np.zeros((1000, 32), np.float32)
    for op, operand in (("Gather", index), ("GatherND", index[:, None])):
        model = vjp_model(op_model(op, [table_, operand]))
        assert "ScatterND" not in {n.op_type for n in model.graph.node}
        g = np.ones((20_000, 32), np.float32)
        got = run(model, {"x0": table_, "x1": operand, "g0": g}, "onnxruntime")[1]
        expected = np.bincount(index, minlength=1000).astype(np.float32)[:, None] * np.ones((1, 32), np.float32)
        np.testing.assert_array_equal(got, expected)


def test_missing_cotangents_of_a_split_are_zeros() -> None:
    graph = gs.Graph(opset=18)
    op = Emitter(graph)
    x = gs.Variable("x", np.float32, [2, 5])
    parts = [gs.Variable(f"y{k}", np.float32, [2, n]) for k, n in enumerate((2, 3))]
    node = gs.Node("Split", attrs={"axis": 1}, inputs=[x, gs.Constant("split", i(2, 3))], outputs=parts)
    g = gs.Variable("g", np.float32, [2, 3])
    graph.inputs = [g]
    d = table.vjp(op, node, 0, [None, g])
    assert d is not None
    d.dtype, d.shape = np.float32, [2, 5]
    graph.outputs = [d]
    value = r(2, 3).astype(np.float32)
    got = run(ir.to_proto(graph), {"g": value})[0]
    np.testing.assert_array_equal(got, np.concatenate([np.zeros((2, 2), np.float32), value], axis=1))
    assert table.vjp(op, node, 0, [None, None]) is None
