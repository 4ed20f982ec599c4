"""Insertion: structure, counts, bit-identical outputs, idempotence."""

import numpy as np
import onnx
import pytest

import zilc
from tests.graphs import CHAIN, SKIP, WEAVE, model
from zilc.executors import executor
from zilc.onnx_io import serialize

GRAPHS = {"chain": CHAIN, "skip": SKIP, "weave": WEAVE}
OUTPUT = {"chain": None, "skip": None, "weave": ["h", "y"]}


def paths(proto: onnx.ModelProto, outputs: list[str]) -> dict[str, set[int]]:
    """Lengths of all paths from each tensor to the outputs, over every edge of the file (none is frozen here)."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    lengths: dict[str, set[int]] = {}

    def walk(name: str) -> set[int]:
        if name not in lengths:
            found = {0} if name in outputs else set()
            for node in readers.get(name, []):
                for out in node.output:
                    found |= {n + 1 for n in walk(out)}
            lengths[name] = found
        return lengths[name]

    for node in proto.graph.node:
        for name in (*node.input, *node.output):
            walk(name)
    return lengths


@pytest.mark.parametrize("placement", ["edge", "shared"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_path_from_a_tensor_has_one_length(name, placement):
    made = zilc.levelize(model(GRAPHS[name]), identities=placement, output=OUTPUT[name])
    outputs = OUTPUT[name] or ["y"]
    assert {len(n) for n in paths(made.model, outputs).values()} == {1}
    before = paths(model(GRAPHS[name]), outputs)
    assert (name == "chain") == all(len(n) == 1 for n in before.values())


@pytest.mark.parametrize("placement", ["edge", "shared"])
@pytest.mark.parametrize("name", GRAPHS)
def test_outputs_are_bit_identical(name, placement):
    proto = model(GRAPHS[name])
    made = zilc.levelize(proto, identities=placement, output=OUTPUT[name]).model
    feeds = {"x": np.random.default_rng(3).standard_normal((5, 4)).astype("f")}
    before, after = executor(proto)(feeds), executor(made)(feeds)
    assert list(before) == list(after)
    assert all(before[n].tobytes() == after[n].tobytes() for n in before)


def test_counts_by_hand():
    report = zilc.levelize(model(SKIP)).report
    assert {k: v["vertices"] for k, v in report["identities"].items()} == {
        "edge": 3, "shared": 3, "min": 3, "min-bytes": 3,
    }  # fmt: skip
    assert report["identities"]["shared"]["bytes_formula"] == "48*N"  # three chains of [N, 4] float32
    report = zilc.levelize(model(WEAVE), output=["h", "y"]).report
    # w: levels 6 -> 2 and 5; b: 4 -> 0 and 3; a is used twice by one op; h.value: 3 -> the terminal
    assert report["identities"]["edge"]["vertices"] == 3 + 3 + 2
    assert report["identities"]["shared"]["vertices"] == 3 + 3 + 2
    assert report["skips"][0]["identities"] == 3


def test_shared_never_needs_more():
    text = SKIP.replace("[relu] h4 = Relu(h3)", "[relu] h4 = Mul(h3, x)")
    report = zilc.levelize(model(text)).report
    assert report["identities"]["edge"]["vertices"] == 3 + 4
    assert report["identities"]["shared"]["vertices"] == 4


@pytest.mark.parametrize("placement", ["edge", "shared"])
@pytest.mark.parametrize("name", GRAPHS)
def test_levelizing_twice_changes_nothing(name, placement):
    once = zilc.levelize(model(GRAPHS[name]), identities=placement, output=OUTPUT[name]).model
    twice = zilc.levelize(once, identities=placement, output=OUTPUT[name]).model
    assert serialize(once) == serialize(twice)


def test_metadata_tells_vertex_level_and_role():
    made = zilc.levelize(model(SKIP)).model
    data = {n.name: {p.key: p.value for p in n.metadata_props} for n in made.graph.node}
    assert data["join"] == {"zilc.vertex": "join", "zilc.role": "forward", "zilc.level": "2"}
    chain = [d for d in data.values() if d["zilc.role"] == "identity"]
    assert sorted(d["zilc.level"] for d in chain) == ["3", "4", "5"]


def test_captured_operand_of_a_branch_is_delayed():
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[4] x, bool c) => (float[4] y) {
      a = Tanh(x)
      b = Exp(a)
      y = If (c) <
        then_branch = t () => (float[4] p) { p = Add(a, b) },
        else_branch = e () => (float[4] q) { q = Sub(b, a) }
      >
    }"""
    proto = onnx.parser.parse_model(text)
    made = zilc.levelize(proto).model
    feeds = {"x": np.float32([1, 2, 3, 4]), "c": np.asarray(True)}
    assert executor(made)(feeds)["y"].tobytes() == executor(proto)(feeds)["y"].tobytes()
    assert sum(n.op_type == "Identity" for n in made.graph.node) == 1
