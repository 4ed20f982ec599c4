"""Which tensors are trained by default, and the reason given for each of the others."""

import numpy as np
import onnx
import onnx.parser
import pytest

import zilc
from tests.graphs import SKIP, model
from zilc.errors import ModelError, OptionError


def verdicts(text, values=None, **options):
    proto = onnx.parser.parse_model(text)
    for name, array in (values or {}).items():
        kept = [t for t in proto.graph.initializer if t.name != name]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend([*kept, onnx.numpy_helper.from_array(np.asarray(array, "f"), name)])
    report = zilc.emit_training(proto, **options).report
    return [t["name"] for t in report["trained"]], {e["name"]: e["reason"] for e in report["left_out"]}


HEAD = '<ir_version: 10, opset_import: ["" : 18]> g (float[N,4] x) => (float[N,4] y) '
R = np.random.default_rng(0).standard_normal


def test_weights_of_products_and_vectors_of_sums():
    body = "{ a = MatMul(x, w)  b = Add(a, c)  d = Mul(b, s)  y = Sub(d, m) }"
    trained, left = verdicts(HEAD + body, {"w": R((4, 4)), "c": R(4), "s": R(4), "m": R(4)})
    assert trained == ["w", "c", "s"]
    assert left == {"m": "read by Sub, not as a weight"}


def test_scalars_and_single_elements():
    body = "{ a = MatMul(x, w)  b = Mul(a, s)  c = Add(b, e)  y = PRelu(c, p) }"
    trained, left = verdicts(HEAD + body, {"w": R((4, 4)), "s": R(()), "e": R(1), "p": R(1)})
    assert trained == ["w", "p"]
    assert left == {"s": "rank 0", "e": "one element, neither bias nor slope"}
    text = HEAD.replace("(float[N,4] y)", "(float[N,1] y)") + "{ a = MatMul(x, w)  y = Add(a, b) }"
    assert verdicts(text, {"w": R((4, 1)), "b": R(1)})[0] == ["w", "b"]


def test_fresh_biases_and_scales_are_no_masks():
    body = "{ a = MatMul(x, w)  b = LayerNormalization<axis=-1>(a, g, c)  y = Add(b, z) }"
    trained, _ = verdicts(HEAD + body, {"w": R((4, 4)), "g": np.ones(4), "c": np.zeros(4), "z": np.zeros(4)})
    assert trained == ["w", "g", "c", "z"]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.tril(np.ones((4, 4))), "a table of 0 and 1"),
        (np.where(np.tril(np.ones((4, 4))), 0, -np.inf), "a mask: values of 1e30 or more"),
        (np.where(np.tril(np.ones((4, 4))), 0, -3.4e38), "a mask: values of 1e30 or more"),
        (np.zeros((4, 4)), "a table of 0 and 1"),
    ],
)
@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_masks(mask, reason, op):
    text = HEAD.replace("N,4", "4,4") + f"{{ a = MatMul(x, w)  y = {op}(a, m) }}"
    trained, left = verdicts(text, {"w": R((4, 4)), "m": mask})
    assert trained == ["w"]
    assert left == {"m": reason}


def test_a_zero_weight_of_a_product_is_trained():
    values = {"w": R((4, 4)), "b": np.zeros((4, 4))}
    assert verdicts(HEAD + "{ a = MatMul(x, w)  y = MatMul(a, b) }", values)[0] == ["w", "b"]


def test_running_statistics_and_bounds():
    body = "{ a = BatchNormalization(x, s, b, m, v)  y = Clip(a, lo, hi) }"
    values = {"s": R(4), "b": R(4), "m": R(4), "v": np.ones(4), "lo": np.float32(-1), "hi": np.float32(1)}
    trained, left = verdicts(HEAD + body, values)
    assert trained == ["s", "b"]
    assert left["m"] == left["v"] == "running statistics of BatchNormalization"
    assert left["lo"].startswith("bounds a Clip")


def test_looked_at_through_operators_that_only_move():
    body = """{ t = Transpose<perm=[1,0]>(w)  a = MatMul(x, t)  e = Slice(p, i, j)  y = Add(a, e) }"""
    text = HEAD.replace("=> (float[N,4] y) ", "=> (float[N,4] y) <int64[1] i = {1}, int64[1] j = {2}> ") + body
    assert verdicts(text, {"w": R((4, 4)), "p": R((3, 4))})[0] == ["w", "p"]


def test_embedding_tables_are_trained():
    text = '<ir_version: 10, opset_import: ["" : 18]> g (int64[N] i) => (float[N,4] y) { y = Gather(e, i) }'
    assert verdicts(text, {"e": R((7, 4))})[0] == ["e"]


def test_wrt_replaces_and_freeze_removes():
    names = lambda **o: [p["name"] for p in zilc.emit_training(model(SKIP), **o).signature["parameters"]]  # noqa: E731
    assert names(wrt=["w*"]) == ["w1", "w2"]
    assert names(wrt="b1") == ["b1"]
    assert names(freeze=["w?"]) == ["b1"]
    step = zilc.emit_training(model(SKIP), wrt=["x", "w2"])
    assert [g["name"] for g in step.signature["input_grads"]] == ["x"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"wrt": ["w3"]}, r"--wrt: no parameter or input matches 'w3'; the nearest: w2, w1"),
        ({"freeze": ["nothing*"]}, r"--freeze: no parameter or input matches 'nothing\*'"),
        ({"wrt": ["h1"]}, r"--wrt: 'h1' is not a floating-point parameter or input"),
    ],
)
def test_names_that_match_nothing(options, text):
    with pytest.raises(OptionError, match=text):
        zilc.emit_training(model(SKIP), **options)


def test_nothing_to_train():
    with pytest.raises(ModelError, match="no parameter to train"):
        zilc.emit_training(model(SKIP), freeze=["*"])
