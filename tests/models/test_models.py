"""The networks build, check, have whole shapes, run, and compute what their PyTorch twins compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime
import pytest
import sklearn.datasets
import torch

from tests import twins
from zilc import models, onnx_io
from zilc.errors import OptionError
from zilc.testing import run

#: Sizes that a test can afford; every network has at least one entry.
SMALL: list[tuple[str, dict[str, Any]]] = [
    ("skip", {"width": 5, "classes": 3}),
    ("mlp2", {"inputs": 12, "hidden": 7, "classes": 4}),
    ("mlp3", {"inputs": 12, "hidden": 7, "classes": 4}),
    ("mlp4", {"inputs": 12, "hidden": 7, "classes": 4}),
    ("residual", {"inputs": 12, "hidden": 7, "classes": 4}),
    ("residual", {"inputs": 5, "hidden": 5, "classes": 5, "layers": 3}),
    ("alexnet", {"image": 63, "width": 4, "hidden": 16, "classes": 5}),
    ("resnet18", {"image": 33, "width": 4, "classes": 5}),
    ("resnet18", {"image": 16, "width": 3, "classes": 5, "blocks": (1, 2)}),
    ("rnn", {"steps": 5, "inputs": 4, "hidden": 6, "outputs": 3}),
    ("rnn", {"steps": 5, "inputs": 4, "hidden": 6, "outputs": 3, "unrolled": False}),
    ("transformer", {"vocabulary": 11, "length": 5, "d_model": 12, "heads": 3, "d_ff": 9}),
    (
        "transformer",
        {"vocabulary": 11, "length": 5, "d_model": 8, "heads": 2, "d_ff": 9, "layers": 2, "causal": False},
    ),
    ("decoder", {"vocabulary": 11, "length": 5, "d_model": 12, "heads": 3, "layers": 2}),
    ("digits", {"channels": 4}),
    ("digits", {}),
]
#: Full sizes: parameters (running statistics included) and the output's shape.
FULL = {
    "skip": (35, ["N", 3]),
    "mlp2": (101_770, ["N", 10]),
    "mlp3": (118_282, ["N", 10]),
    "mlp4": (134_794, ["N", 10]),
    "residual": (400_906, ["N", 10]),
    "alexnet": (61_100_840, ["N", 1000]),  # torchvision's alexnet: 61,100,840
    "resnet18": (11_699_112, ["N", 1000]),  # torchvision's resnet18: 11,689,512, and 9,600 running statistics
    "rnn": (49_408, ["N", 128]),
    "transformer": (32_653_934, ["N", 35, 28782]),
    "decoder": (5_273_088, ["N", 64, 8192]),  # 8,192 · 256 + 64 · 256, four blocks of 789,760, a norm of 512
    "digits": (17_658, ["N", 10]),
}


def _id(value: object) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


small = pytest.mark.parametrize(("name", "sizes"), SMALL, ids=_id)


def _dims(info: onnx.ValueInfoProto) -> list[int | str | None]:
    kind = info.type.tensor_type
    assert kind.HasField("shape"), info.name
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]


def _assert_whole_shapes(model: onnx.ModelProto) -> None:
    """Every tensor has a shape, of numbers and of the model's own symbolic names."""
    made = {info.name: _dims(info) for info in (*model.graph.value_info, *model.graph.output)}
    own = {d for info in model.graph.input for d in _dims(info) if isinstance(d, str)}
    for node in model.graph.node:
        for output in node.output:
            assert all(isinstance(d, int) or d in own for d in made[output]), (output, made[output])


def _node_count(model: onnx.ModelProto, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph.node)


def _consumers(model: onnx.ModelProto, tensor: str) -> int:
    return sum(list(node.input).count(tensor) for node in model.graph.node)


def test_every_network_is_tested() -> None:
    assert {name for name, _ in SMALL} == set(FULL) == set(models.names())


@pytest.mark.parametrize("name", FULL)
def test_full_size(name: str) -> None:
    model = models.build(name)
    count, output = FULL[name]
    assert sum(array.size for array in twins.parameters(model).values()) == count
    assert [_dims(info) for info in model.graph.output] == [output]
    _assert_whole_shapes(model)


@small
def test_builds_and_checks(name: str, sizes: dict[str, Any]) -> None:
    model = models.build(name, **sizes)
    onnx.checker.check_model(model, full_check=True)
    _assert_whole_shapes(model)
    nodes = [node.name for node in model.graph.node]
    assert all(nodes)
    assert len(set(nodes)) == len(nodes)
    assert model.graph.name == name
    assert [o.version for o in model.opset_import] == [18]


@small
def test_float32_equals_its_twin_in_onnxruntime(name: str, sizes: dict[str, Any]) -> None:
    model = models.build(name, seed=3, **sizes)
    feeds = models.random_feeds(model, 3, np.random.default_rng(1))
    (got,) = run(model, feeds, "onnxruntime")
    truth = twins.torch_forward(name, model, feeds)
    assert got.dtype == truth.dtype == np.float32
    np.testing.assert_allclose(got, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).max())


@small
def test_float64_equals_its_twin_in_the_reference_evaluator(name: str, sizes: dict[str, Any]) -> None:
    model = models.build(name, seed=3, dtype="float64", **sizes)
    feeds = models.random_feeds(model, 2, np.random.default_rng(1))
    (got,) = run(model, feeds)
    truth = twins.torch_forward(name, model, feeds)
    assert got.dtype == truth.dtype == np.float64
    np.testing.assert_allclose(got, truth, rtol=1e-12, atol=1e-12 * np.abs(truth).max())


@small
def test_every_parameter_matters(name: str, sizes: dict[str, Any]) -> None:
    """Reverse mode reaches all parameters, and its directional derivatives are those of the ONNX model."""
    model = models.build(name, seed=3, dtype="float64", **sizes)
    rng = np.random.default_rng(2)
    feeds = models.random_feeds(model, 2, rng, loss="energy")
    target = feeds.pop("target")
    gradients = twins.torch_gradients(name, model, feeds, target)
    trained = {key: array for key, array in twins.parameters(model).items() if not twins.is_statistic(key)}
    assert {key: g.shape for key, g in gradients.items()} == {key: a.shape for key, a in trained.items()}
    # Key biases shift all scores of a softmax alike: no derivative.
    assert [key for key, g in gradients.items() if np.abs(g).max() < 1e-12 and "key.bias" not in key] == []

    direction = {key: rng.standard_normal(array.shape) for key, array in trained.items()}
    step = 1e-6

    def energy(h: float) -> float:
        moved = onnx.ModelProto()
        moved.CopyFrom(model)
        for tensor in moved.graph.initializer:
            if tensor.name in direction:
                array = trained[tensor.name] + h * direction[tensor.name]
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        return 0.5 * float(np.square(run(moved, feeds)[0] - target).sum())

    exact = sum(float(np.vdot(gradients[key], direction[key])) for key in direction)
    assert (energy(step) - energy(-step)) / (2 * step) == pytest.approx(exact, rel=1e-5)


@small
def test_the_seed_decides_the_bytes(name: str, sizes: dict[str, Any]) -> None:
    made = [onnx_io.serialize(models.build(name, seed=seed, **sizes)) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("name", models.names())
def test_dtypes_are_one_function(name: str) -> None:
    sizes = next(sizes for known, sizes in SMALL if known == name)
    single, double = (twins.parameters(models.build(name, dtype=d, **sizes)) for d in ("float32", "float64"))
    assert single.keys() == double.keys()
    for key, array in single.items():
        assert double[key].dtype == np.float64
        np.testing.assert_array_equal(array.astype(np.float64), double[key])


@small
@pytest.mark.parametrize("opset", [20, 23, 26])
def test_newer_opsets(name: str, sizes: dict[str, Any], opset: int) -> None:
    model = models.build(name, opset=opset, **sizes)
    assert [o.version for o in model.opset_import] == [opset]
    feeds = models.random_feeds(model, 2)
    old = run(models.build(name, **sizes), feeds, "onnxruntime")[0]
    new = run(model, feeds, "onnxruntime")[0]
    np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6 * np.abs(old).max())


@pytest.mark.parametrize("batch", [1, 20, "examples"])
@pytest.mark.parametrize("name", models.names())
def test_batch(name: str, batch: int | str) -> None:
    sizes = next(sizes for known, sizes in SMALL if known == name)
    model = models.build(name, batch=batch, **sizes)
    assert _dims(model.graph.input[0])[0] == _dims(model.graph.output[0])[0] == batch
    feeds = models.random_feeds(model, 3)
    expected = batch if isinstance(batch, int) else 3
    assert run(model, feeds, "onnxruntime")[0].shape[0] == expected


def test_mlp_is_tanh_layers() -> None:
    model = models.build("mlp4")
    assert [node.op_type for node in model.graph.node] == [*["Gemm", "Tanh"] * 3, "Gemm"]
    assert [node.name for node in model.graph.node][:3] == ["layer1/Gemm", "layer1/Tanh", "layer2/Gemm"]
    assert [t.name for t in model.graph.initializer][:2] == ["layer1.weight", "layer1.bias"]


@pytest.mark.parametrize(
    ("sizes", "skips"),
    [({}, 3), ({"layers": 2}, 0), ({"inputs": 256}, 4), ({"hidden": 10, "inputs": 10, "layers": 5}, 5)],
    ids=_id,
)
def test_residual_skips_where_the_width_is_kept(sizes: dict[str, int], skips: int) -> None:
    assert _node_count(models.build("residual", **sizes), "Add") == skips


def test_rnn_shares_its_weights_over_time() -> None:
    model = models.build("rnn")
    shared = {name: _consumers(model, name) for name in ("rnn.weight_ih", "rnn.weight_hh", "rnn.bias")}
    assert shared == {"rnn.weight_ih": 28, "rnn.weight_hh": 27, "rnn.bias": 28}


def test_rnn_forms_are_one_function() -> None:
    sizes = {"steps": 4, "inputs": 3, "hidden": 5, "outputs": 2}
    forms = [models.build("rnn", unrolled=unrolled, **sizes) for unrolled in (True, False)]
    assert [_node_count(model, "RNN") for model in forms] == [0, 1]
    feeds = models.random_feeds(forms[0], 3)
    unrolled, operator = (run(model, feeds, "onnxruntime")[0] for model in forms)
    np.testing.assert_allclose(unrolled, operator, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_looks_ahead_only_without_its_mask(causal: bool) -> None:
    model = models.build("transformer", vocabulary=11, length=6, d_model=8, heads=2, d_ff=9, causal=causal)
    tokens = models.random_feeds(model, 1)["tokens"]
    later = tokens.copy()
    later[0, 3] = (later[0, 3] + 1) % 11
    before, after = (run(model, {"tokens": t}, "onnxruntime")[0] for t in (tokens, later))
    assert np.array_equal(before[0, :3], after[0, :3]) == causal
    assert not np.array_equal(before[0, 3:], after[0, 3:])


def test_transformer_positions_are_no_parameter() -> None:
    model = models.build("transformer", vocabulary=11, length=6, d_model=8, heads=2, d_ff=9)
    roots = {"embedding", "layer1", "head"}
    assert {name.split(".")[0] for name in twins.parameters(model)} == roots


def test_alexnet_dropout_draws_masks() -> None:
    sizes = {"image": 63, "width": 4, "hidden": 16, "classes": 5}
    plain, dropped = (models.build("alexnet", dropout=dropout, **sizes) for dropout in (False, True))
    assert [_node_count(model, "Dropout") for model in (plain, dropped)] == [0, 2]
    feeds = models.random_feeds(plain, 2)
    # Without this ONNX Runtime takes a Dropout whose mask is unread for that of inference.
    settings = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": ["EliminateDropout"]}
    session = onnxruntime.InferenceSession(dropped.SerializeToString(), **settings)
    first, second = (session.run(None, feeds)[0] for _ in range(2))
    whole = run(plain, feeds, "onnxruntime")[0]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, whole)


@pytest.mark.parametrize("seed", [0, 1])
def test_digits_trains(seed: int) -> None:
    """At least 97 % of 360 held-out digits after 20 epochs of Adam (98.5 % is usual)."""
    pixels, digits = sklearn.datasets.load_digits(return_X_y=True)
    images = torch.from_numpy((pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8))
    labels = torch.from_numpy(digits)
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out, seen = order[:360], order[360:]
    model = models.build("digits", seed=seed)
    params, net = twins.to_torch(twins.parameters(model)), twins.twin("digits", model)
    optimizer = torch.optim.Adam([p.requires_grad_() for p in params.values()], lr=2e-3)
    for _ in range(20):
        order = np.random.default_rng(seed).permutation(seen)
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            optimizer.zero_grad()
            twins.torch_loss(net(params, {"image": images[batch]}), labels[batch], "cross-entropy").backward()
            optimizer.step()
    with torch.no_grad():
        guessed = net(params, {"image": images[held_out]}).argmax(1)
    assert (guessed == labels[held_out]).double().mean() >= 0.97


def test_random_feeds_stay_in_bounds() -> None:
    text = """<ir_version: 10, opset_import: ["": 18]>
    g (int32[batch, tokens] ids, int64[batch, tokens] mask, bool[batch] keep, float[batch, 3] x)
        => (float[batch, tokens, 2] y)
        <float[3, 2] table = {1, 2, 3, 4, 5, 6}> {
      long = Cast<to = 7>(ids)
      flat = Identity(long)
      rows = Gather(table, flat)
      y = Identity(rows)
    }"""
    model = onnx.parser.parse_model(text)
    feeds = models.random_feeds(model, 5, np.random.default_rng(0), dims={"tokens": 40}, loss="cross-entropy")
    assert {name: (array.dtype.name, array.shape) for name, array in feeds.items()} == {
        "ids": ("int32", (5, 40)),
        "mask": ("int64", (5, 40)),
        "keep": ("bool", (5,)),
        "x": ("float32", (5, 3)),
        "target": ("int64", (5, 40)),
    }
    assert set(np.unique(feeds["ids"])) == {0, 1, 2}
    assert feeds["mask"].all()
    assert feeds["keep"].all()
    assert set(np.unique(feeds["target"])) == {0, 1}


@pytest.mark.parametrize("loss", ["energy", "mse", "cross-entropy", "bce-with-logits"])
def test_random_targets_suit_the_loss(loss: str) -> None:
    """A step down the twin's gradient lowers the loss."""
    model = models.build("mlp3", dtype="float64", inputs=6, hidden=5, classes=4)
    feeds = models.random_feeds(model, 8, loss=loss)
    target = feeds.pop("target")
    before, gradients = twins.torch_loss_and_gradients("mlp3", model, feeds, target, loss)
    moved = {key: array - 1e-3 * gradients[key] for key, array in twins.parameters(model).items()}
    after, _ = twins.torch_loss_and_gradients("mlp3", model, feeds, target, loss, params=moved)
    norm = sum(float(np.square(g).sum()) for g in gradients.values())
    assert after - before == pytest.approx(-1e-3 * norm, rel=5e-2)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "vgg",
            {},
            "zilc.models.build: no network 'vgg', expected one of: skip, mlp2, mlp3, mlp4, residual, alexnet, "
            "resnet18, rnn, transformer, decoder, digits",
        ),
        ("mlp2", {"dtype": "float16"}, "mlp2: dtype is 'float16', expected 'float32' or 'float64'"),
        ("transformer", {"heads": 7}, "transformer: d_model is 512, expected an even multiple of heads (7)"),
        (
            "alexnet",
            {"image": 32},
            "alexnet: nothing is left of the image at the pooling after conv5, expected a larger one",
        ),
    ],
)
def test_errors(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        models.build(name, **options)
    assert str(caught.value) == text
