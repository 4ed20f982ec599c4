"""Trainer: torch.optim's numbers, state on the device, exact conversion of feeds, and errors that say what to do."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest
import torch

import zilc
from zilc import checkpoint, data, models, onnx_io, providers, runtime
from zilc.errors import DataError, ModelError, OptionError, RuntimeMissing
from zilc.runtime import Trainer
from zilc.session import TrainingSession, make_session

CPU = ["CPUExecutionProvider"]
SIZES = {"inputs": 6, "hidden": 5, "classes": 3}

OPTIMIZERS: list[tuple[str, dict[str, Any], Any]] = [
    ("sgd", {}, torch.optim.SGD),
    ("sgd", {"weight_decay": 0.1, "maximize": True}, torch.optim.SGD),
    ("momentum", {"momentum": 0.9}, torch.optim.SGD),
    ("momentum", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05}, torch.optim.SGD),
    ("momentum", {"momentum": 0.7, "dampening": 0.4, "weight_decay": 0.05}, torch.optim.SGD),
    ("adam", {}, torch.optim.Adam),
    ("adam", {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}, torch.optim.Adam),
    ("adam", {"amsgrad": True}, torch.optim.Adam),
    ("adamw", {}, torch.optim.AdamW),
    ("adamw", {"amsgrad": True, "weight_decay": 0.2}, torch.optim.AdamW),
]


def _mlp(dtype: str = "float32", **options: Any) -> onnx.ModelProto:
    return models.build("mlp3", dtype=dtype, **{**SIZES, **options})


def _batches(count: int, size: int = 4, dtype: Any = np.float32, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {"input": rng.standard_normal((size, 6)).astype(dtype), "target": rng.standard_normal((size, 3)).astype(dtype)}
        for _ in range(count)
    ]


def _trainer(lr: float = 0.05, model: onnx.ModelProto | None = None, **options: Any) -> Trainer:
    return Trainer(zilc.emit_training(model or _mlp(), **options), lr=lr, providers=CPU)


def _torch_steps(
    state: Mapping[str, np.ndarray],
    batches: list[dict[str, np.ndarray]],
    lrs: list[float],
    optimizer: Any,
    options: dict[str, Any],
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The same network by autograd, in the dtype of its parameters; energy ½ Σ (μ − y)²."""
    p = {n: torch.tensor(state[n], requires_grad=True) for n in state if n.startswith("layer") and n.count(".") == 1}
    optimizer = optimizer(list(p.values()), lr=lrs[0], **options)
    losses = []
    for feeds, lr in zip(batches, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        h = torch.from_numpy(feeds["input"])
        for layer in ("layer1", "layer2", "layer3"):
            h = torch.nn.functional.linear(h, p[f"{layer}.weight"], p[f"{layer}.bias"])
            h = torch.tanh(h) if layer != "layer3" else h
        loss = 0.5 * (h - torch.from_numpy(feeds["target"])).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: t.detach().numpy() for n, t in p.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6)])
@pytest.mark.parametrize(("name", "options", "optimizer"), OPTIMIZERS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_optimizers_equal_torch(name: str, options: dict, optimizer: Any, dtype: str, tolerance: float) -> None:
    batches = _batches(7, dtype=dtype)
    lrs = [0.05, 0.05, 0.05, 0.02, 0.02, 0.01, 0.01]
    trainer = Trainer(zilc.emit_training(_mlp(dtype), optimizer=name, options=options), lr=lrs[0], providers=CPU)
    before = trainer.state
    losses = []
    for feeds, lr in zip(batches, lrs, strict=True):
        trainer.lr = lr
        losses.append(trainer.step(feeds))
    truth, after = _torch_steps(before, batches, lrs, optimizer, options)
    np.testing.assert_allclose(losses, truth, rtol=10 * tolerance)
    state = trainer.state
    for key, value in after.items():
        assert state[key].dtype == value.dtype == np.dtype(dtype)
        assert not np.array_equal(state[key], before[key])
        # Relative to the largest weight: single weights pass near zero.
        assert np.abs(state[key] - value).max() <= tolerance * np.abs(value).max(), key


# --- the state stays where it is ------------------------------------------------------------------------------


def test_two_sets_of_buffers_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    # As where nothing is written over itself (tests/test_in_place.py).
    plain = lambda model, providers, *_, **__: TrainingSession(make_session(model, providers))  # noqa: E731
    monkeypatch.setattr(runtime, "make_training_session", plain)
    trainer = _trainer(optimizer="adam")
    pointers = []
    for feeds in _batches(4):
        pointers.append({name: b.value.data_ptr() for name, b in trainer._sides[trainer._side].items()})
        trainer.step(feeds)
    assert pointers[0] == pointers[2]
    assert pointers[1] == pointers[3]
    for name, pointer in pointers[0].items():
        assert pointer != pointers[1][name], name
    # onnxruntime reads and writes this very memory: what it holds is the state.
    for name, buffer in trainer._sides[trainer._side].items():
        assert buffer.array.ctypes.data == buffer.value.data_ptr()
        np.testing.assert_array_equal(buffer.array, trainer.state[name])


def test_state_is_a_copy() -> None:
    trainer = _trainer()
    state = trainer.state
    for array in state.values():
        array[...] = 0
    assert all(np.any(a) for n, a in trainer.state.items() if n.endswith("weight"))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resuming_is_bit_identical(tmp_path: Path, optimizer: str) -> None:
    step = zilc.emit_training(_mlp(), optimizer=optimizer)
    batches = _batches(8)
    whole = Trainer(step, lr=0.05, providers=CPU)
    truth = [whole.step(feeds) for feeds in batches]

    first = Trainer(step, lr=0.05, providers=CPU)
    losses = [first.step(feeds) for feeds in batches[:3]]
    checkpoint.save_state(tmp_path / "state.safetensors", first.state, first.digest)
    second = Trainer(step, lr=0.05, providers=CPU, state=tmp_path / "state.safetensors")
    losses += [second.step(feeds) for feeds in batches[3:5]]
    third = Trainer(step, lr=0.05, providers=CPU)
    third.load_state(second.state)
    losses += [third.step(feeds) for feeds in batches[5:]]

    assert losses == truth
    for name, array in whole.state.items():
        np.testing.assert_array_equal(third.state[name], array)
    if optimizer == "adam":
        assert whole.state["step"] == third.updates == 8


def test_from_files(tmp_path: Path) -> None:
    step = zilc.emit_training(_mlp(), optimizer="momentum")
    data = onnx_io.save(step.model, tmp_path / "step.onnx")
    checkpoint.save_state(tmp_path / "step.safetensors", step.state, checkpoint.graph_digest(data))
    one, two = Trainer(tmp_path / "step.onnx", lr=0.1, providers=CPU), Trainer(step, lr=0.1, providers=CPU)
    for feeds in _batches(3):
        assert one.step(feeds) == two.step(feeds)
    with pytest.raises(OptionError, match=r"trainer\.export\(path, model='MODEL\.onnx'\)"):
        one.export(tmp_path / "out.onnx")
    one.export(tmp_path / "one.onnx", model=_mlp())
    two.export(tmp_path / "two.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    onnx_io.save(zilc.emit_training(_mlp(), optimizer="sgd").model, tmp_path / "step.onnx")
    with pytest.raises(DataError, match="the state of another training graph"):
        Trainer(tmp_path / "step.onnx", lr=0.1, providers=CPU)


def test_a_handmade_graph_with_seed_and_carried_state() -> None:
    """Trainer knows the signature alone: anything that is fed back, and a seed that counts on."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18]>
        handmade (float[N] x, float[2] w, float c, int64 s, float lr)
              => (float loss, float[2] n, float d, float[2] seen) {
            zero = Constant <value = int64 {0}> ()
            axis = Unsqueeze(zero, zero)
            loss = ReduceSum <keepdims = 0> (x)
            g = Mul(lr, loss)
            n = Sub(w, g)
            one = Constant <value = float {1.0}> ()
            d = Add(c, one)
            f = Cast <to = 1> (s)
            v = Unsqueeze(f, axis)
            seen = Concat <axis = 0> (v, v)
        }""")
    signature = {
        "version": 1, "zilc": "0", "algorithm": "zil", "schedule": "wavefront", "identities": "shared", "levels": 0,
        "inputs": ["x"], "targets": [{"name": None, "output": "loss", "loss": "none"}], "lr": "lr", "step": None,
        "seed": "s", "loss": "loss", "predictions": ["seen"], "input_grads": [],
        "parameters": [{"name": "w", "level": 1, "grad": None, "next": "n", "state": []}],
        "carried": [{"name": "c", "next": "d"}],
    }  # fmt: skip
    step = zilc.TrainingStep(
        model, signature, {"w": np.ones(2, np.float32), "c": np.float32(5)}, {}, onnx_io.load(model)
    )
    trainer = Trainer(step, lr=0.5, providers=CPU, seed=40)
    for count, size in enumerate((1, 3, 3)):
        assert trainer.step({"x": np.ones(size, np.float32)}) == size
        assert trainer.last["seen"].tolist() == [40 + count] * 2
    assert trainer.state["c"] == 8
    assert trainer.state["w"].tolist() == [1 - 0.5 * 7] * 2
    assert trainer.evaluate({"x": np.ones(2, np.float32)}).loss == 2


# --- evaluate, last -------------------------------------------------------------------------------------------


def test_evaluate_changes_nothing() -> None:
    step = zilc.emit_training(_mlp(), optimizer="adam", outputs="both", wrt=["input", "layer*"])
    trainer = Trainer(step, lr=0.01, providers=CPU)
    (feeds, other) = _batches(2)
    assert dict(trainer.last) == {}
    trainer.step(feeds)
    before = trainer.state
    found = trainer.evaluate(other)
    assert all(np.array_equal(a, before[n]) for n, a in trainer.state.items())
    assert trainer.step(other) == pytest.approx(found.loss, rel=1e-6)
    np.testing.assert_allclose(found.predictions["logits"], trainer.last["logits"], rtol=1e-6, atol=1e-7)
    gradients = {f"layer{k}.{part}.grad" for k in (1, 2, 3) for part in ("weight", "bias")}
    assert set(trainer.last) == {"logits", "input.grad"} | gradients
    assert trainer.last["layer1.weight.grad"].shape == (5, 6)
    with pytest.raises(KeyError):
        trainer.last["loss"]


def test_batches_of_any_size() -> None:
    one, two = _trainer(), _trainer()
    for size in (4, 4, 1, 7, 4):
        (feeds,) = _batches(1, size, seed=size)
        assert one.step(feeds) == two.step({k: v.copy() for k, v in feeds.items()})
        assert one.last["logits"].shape == (size, 3)


def test_evaluation_runs_the_forward_pass_alone() -> None:
    trainer = _trainer()
    trainer.evaluate(_batches(1)[0])
    forward = {i.name for i in trainer._evaluator._session.get_inputs()}
    assert forward == {"input", "target", *(n for n in trainer.state)}


# --- feeds ----------------------------------------------------------------------------------------------------


def test_feeds_are_converted_exactly() -> None:
    (feeds,) = _batches(1, dtype=np.float64)
    exact = {k: v.astype(np.float32) for k, v in feeds.items()}
    assert _trainer().step(feeds) == _trainer().step(exact)
    assert _trainer().step({k: v.tolist() for k, v in feeds.items()}) == _trainer().step(exact)
    swapped = {k: v.astype(">f4") for k, v in exact.items()}
    assert _trainer().step(swapped) == _trainer().step(exact)
    strided = {k: np.asfortranarray(v) for k, v in exact.items()}
    assert _trainer().step(strided) == _trainer().step(exact)
    labels = _trainer(loss="cross-entropy")
    for dtype in (np.uint8, np.int32, np.int64):
        labels.step({"input": exact["input"], "target": np.array([0, 1, 2, 1], dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None},
         r"feeds: missing 'target'; it has 'input'. Expected: 'input' float32 \[N, 6\]; 'target' int64 \[N\]"),
        ({"targets": np.zeros(4)}, "feeds: unknown 'targets'; it has 'input', 'target', 'targets'"),
        ({"input": np.zeros((4, 5))}, r"feeds: 'input' has shape \[4, 5\], expected \[N, 6\]"),
        ({"input": np.zeros(6)}, r"feeds: 'input' has shape \[6\], expected \[N, 6\]"),
        ({"target": np.zeros(3, np.int64)}, r"'target' has shape \[3\], expected \[N\] with N = 4 as in 'input'"),
        ({"target": np.zeros(4)}, r"'target' holds float64, expected int64. Convert it: target.astype\(numpy.int64\)"),
        ({"target": np.full(4, 2**63, np.uint64)}, "'target' holds values that int64 cannot"),
        ({"input": np.full((4, 6), "a")}, "'input' holds str.*, expected float32"),
        ({"target": np.full(4, 9)}, "onnxruntime cannot compute with these values .*labels out of range"),
    ],
)  # fmt: skip
def test_feeds_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    trainer = _trainer(loss="cross-entropy")
    good = {"input": _batches(1)[0]["input"], "target": np.array([0, 1, 2, 0])}
    for warm in (False, True):
        if warm:
            trainer.step(good)
        before = trainer.state
        feeds = {k: v for k, v in {**good, **change}.items() if v is not None}
        with pytest.raises(DataError, match=message):
            trainer.step(feeds)
        assert all(np.array_equal(a, before[n]) for n, a in trainer.state.items())
    fresh = _trainer(loss="cross-entropy")
    fresh.step(good)
    assert trainer.step(good) == fresh.step(good)


def test_a_state_that_does_not_fit() -> None:
    trainer = _trainer()
    state = trainer.state
    with pytest.raises(DataError, match=r"state: missing 'layer1\.bias'"):
        trainer.load_state({n: a for n, a in state.items() if n != "layer1.bias"})
    with pytest.raises(DataError, match="state: unknown 'step'"):
        trainer.load_state({**state, "step": np.int64(1)})
    with pytest.raises(DataError, match=r"'layer1.bias' is float64 \[5\], expected float32 \[5\]"):
        trainer.load_state({**state, "layer1.weight": state["layer1.weight"] + 1, "layer1.bias": np.zeros(5)})
    assert all(np.array_equal(a, state[n]) for n, a in trainer.state.items())


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1.0])
def test_learning_rates(lr: float) -> None:
    with pytest.raises(OptionError, match="expected a finite number"):
        _trainer(lr)


def test_gradients_alone_do_not_train() -> None:
    with pytest.raises(OptionError, match=r"no updates.*--outputs next or both"):
        _trainer(outputs="grad")


def test_a_model_is_no_training_graph(tmp_path: Path) -> None:
    onnx_io.save(_mlp(), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"model\.onnx: no 'zilc\.signature'.*zilc emit-training"):
        Trainer(tmp_path / "model.onnx", lr=0.1)


def test_frozen_external_weights(tmp_path: Path) -> None:
    """What is not trained may stay in its file."""
    onnx_io.save(models.build("mlp3", inputs=300, hidden=16, classes=3), tmp_path / "m.onnx", external=True)
    step = zilc.emit_training(tmp_path / "m.onnx", freeze="layer1.*")
    trainer = Trainer(step, lr=0.1, providers=CPU)
    rng = np.random.default_rng(0)
    feeds = {"input": rng.standard_normal((2, 300)), "target": rng.standard_normal((2, 3))}
    whole = _trainer(0.1, models.build("mlp3", inputs=300, hidden=16, classes=3), freeze="layer1.*")
    data = onnx_io.save(step.model, tmp_path / "step.onnx", base_dir=step.source.base_dir, external=True)
    checkpoint.save_state(tmp_path / "step.safetensors", step.state, checkpoint.graph_digest(data))
    from_file = Trainer(tmp_path / "step.onnx", lr=0.1, providers=CPU)
    assert (tmp_path / "step.onnx.data").stat().st_size >= 300 * 16 * 4
    for _ in range(2):
        assert trainer.step(feeds) == whole.step(feeds) == from_file.step(feeds)


# --- fit ------------------------------------------------------------------------------------------------------


def _data(count: int = 22, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 6)).astype(np.float32)
    return {"input": x, "target": x[:, :3].argmax(1)}


def test_fit_counts_and_averages() -> None:
    seen: list[Any] = []
    trainer = _trainer(loss="cross-entropy")
    twin = _trainer(loss="cross-entropy")
    data = _data()
    history = trainer.fit(data, epochs=2, batch_size=8, seed=3, val=_data(10, seed=1), on_batch=seen.append)
    assert [(p.epoch, p.batch, p.batches, p.examples) for p in seen] == [
        (e, b, 3, n) for e in (1, 2) for b, n in ((1, 8), (2, 8), (3, 6))
    ]
    for epoch, entry in enumerate(history, 1):
        order = np.random.default_rng([3, epoch]).permutation(22)
        loss = right = 0.0
        for start in range(0, 22, 8):
            rows = order[start : start + 8]
            loss += len(rows) * twin.step({k: v[rows] for k, v in data.items()})
            right += np.sum(twin.last["logits"].argmax(1) == data["target"][rows])
        assert entry["epoch"] == epoch
        assert entry["loss"] == pytest.approx(loss / 22, rel=1e-12)
        assert entry["accuracy"] == right / 22
        held_out = twin.evaluate(_data(10, seed=1))
        assert entry["val_loss"] == pytest.approx(held_out.loss, rel=1e-6)
        assert entry["val_accuracy"] == np.mean(held_out.predictions["logits"].argmax(1) == _data(10, seed=1)["target"])


def test_batches_cut_ahead_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _trainer(loss="cross-entropy"), _trainer(loss="cross-entropy")
    plain = first.fit(_data(), epochs=2, batch_size=8, seed=3)
    threads: set[str] = set()

    def noting(self: Any, *args: Any) -> Any:
        for batch in cut(self, *args):
            threads.add(threading.current_thread().name)
            yield batch

    cut = data.Examples.batches
    monkeypatch.setattr(data.Examples, "batches", noting)
    monkeypatch.setattr(runtime, "PREFETCHED", 0)
    ahead = second.fit(_data(), epochs=2, batch_size=8, seed=3)
    assert [{**e, "seconds": 0} for e in ahead] == [{**e, "seconds": 0} for e in plain]
    for name, array in first.state.items():
        np.testing.assert_array_equal(second.state[name], array)
    assert threads
    assert all(name.startswith("zilc-batches") for name in threads)


def test_an_error_in_a_batch_cut_ahead_is_raised() -> None:
    def failing() -> Any:
        yield 1
        raise ValueError("no more")

    batches = data.prefetched(failing())
    assert next(batches) == 1
    with pytest.raises(ValueError, match="no more"):
        next(batches)


def test_fit_gives_energy_per_example_and_learns() -> None:
    data = {"input": _data(40)["input"], "target": _data(40)["input"][:, :3] * 0.5}
    trainer = _trainer(0.02)
    first = trainer.evaluate(data).loss / 40
    history = trainer.fit(data, epochs=20, batch_size=10, shuffle=False)
    assert history[0]["loss"] < first
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]
    assert trainer.evaluate(data).loss / 40 == pytest.approx(history[-1]["loss"], rel=0.2)
    assert "accuracy" not in history[0]


def test_fit_with_bce_has_accuracy() -> None:
    data = {"input": _data(40)["input"], "target": (_data(40)["input"][:, :3] > 0).astype(np.float32)}
    trainer = _trainer(0.5, loss="bce-with-logits")
    history = trainer.fit(data, epochs=80, batch_size=10)
    predictions = trainer.evaluate(data).predictions["logits"]
    assert history[-1]["accuracy"] > 0.9 > history[0]["accuracy"]
    assert history[-1]["accuracy"] == pytest.approx(np.mean((predictions > 0) == data["target"]), abs=0.05)


def test_a_fixed_batch_drops_the_rest() -> None:
    trainer = _trainer(0.01, _mlp(batch=8), loss="cross-entropy")
    seen: list[Any] = []
    trainer.fit(_data(22), epochs=1, batch_size=8, on_batch=seen.append)
    assert [p.examples for p in seen] == [8, 8]
    with pytest.raises(OptionError, match="the model's batch dimension is fixed at 8, not 5"):
        trainer.fit(_data(22), epochs=1, batch_size=5)
    with pytest.raises(DataError, match="data: 7 examples, expected at least 8"):
        trainer.fit(_data(7), epochs=1, batch_size=8)


def test_a_loss_that_is_not_finite_stops() -> None:
    data = _data()
    data["input"][9, 0] = np.nan
    with pytest.raises(DataError, match=r"epoch 1, batch 2: the loss is nan. Try a learning rate below 0\.05"):
        _trainer(loss="cross-entropy").fit(data, epochs=1, batch_size=8, shuffle=False)


# --- providers ------------------------------------------------------------------------------------------------


def test_cpu_is_always_there() -> None:
    assert providers.choose_providers("cpu") == (CPU, "CPU: asked for")
    chosen, why = providers.choose_providers("auto")
    assert chosen[-1] == "CPUExecutionProvider"
    assert not any("Tensorrt" in str(p) for p in chosen)
    assert why.startswith("CPU: " if len(chosen) == 1 else "CUDA: ")
    with pytest.raises(OptionError, match=r"no device 'tpu'\. Choose auto, cpu or cuda"):
        providers.choose_providers("tpu")


@pytest.mark.parametrize(
    ("listed", "gpu", "probe", "reason"),
    [
        (["CPUExecutionProvider"], True, "", "has no CUDA provider"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], False, "", "no NVIDIA GPU found"),
        (["CUDAExecutionProvider"], True, "libcudnn.so.9 is not there", "libcudnn.so.9 is not there"),
    ],
)
def test_no_cuda_says_why(
    monkeypatch: pytest.MonkeyPatch, listed: list[str], gpu: bool, probe: str, reason: str
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(providers, "has_gpu", lambda: gpu)
    monkeypatch.setattr(providers, "probe_cuda", lambda: probe)
    chosen, why = providers.choose_providers("auto")
    assert chosen == CPU
    assert reason in why
    with pytest.raises(RuntimeMissing, match=f"--device cuda: CUDA cannot be had: .*{reason}.*--device cpu"):
        providers.choose_providers("cuda")


def test_cuda_is_taken_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(providers, "has_gpu", lambda: True)
    monkeypatch.setattr(providers, "probe_cuda", lambda: "")
    for device in ("auto", "cuda"):
        chosen, why = providers.choose_providers(device)
        assert [p if isinstance(p, str) else p[0] for p in chosen] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
        assert why.startswith("CUDA: ")


def test_the_probe_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """On a machine without CUDA's libraries onnxruntime writes to stderr, and its Python layer to stdout."""
    reason = providers.probe_cuda.__wrapped__()
    assert reason == "" or "\n" not in reason
    assert capfd.readouterr() == ("", "")


def test_installations_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "installed", lambda: ["onnxruntime", "onnxruntime-gpu"])
    monkeypatch.setattr(providers, "has_gpu", lambda: False)
    _, why = providers.choose_providers("auto")
    assert "installed over each other: 'pip uninstall onnxruntime onnxruntime-gpu'" in why
    with pytest.raises(RuntimeMissing, match="then 'pip install onnxruntime-gpu'"):
        providers.choose_providers("cuda")
    import onnxruntime

    monkeypatch.delattr(onnxruntime, "get_available_providers")
    with pytest.raises(RuntimeMissing, match=r"onnxruntime does not load .*installed over each other"):
        providers.choose_providers("cpu")


def test_training_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    trainer = _trainer(loss="cross-entropy")
    trainer.fit(_data(), epochs=1, batch_size=8, val=_data())
    with pytest.raises(DataError):
        trainer.step({"input": np.zeros((1, 6)), "target": np.array([7])})
    assert capfd.readouterr() == ("", "")


def test_an_empty_batch_is_refused_where_onnxruntime_would_not_end() -> None:
    model = models.build("resnet18", image=33, width=8, classes=10)
    step = zilc.emit_training(model, loss="cross-entropy")
    feeds = models.random_feeds(model, 2, np.random.default_rng(0), loss="cross-entropy")
    trainer = Trainer(step, lr=0.1, providers=CPU)
    loss = trainer.step(feeds)
    with pytest.raises(DataError, match=r"has shape \[0, 3, 33, 33\]: no examples.*Leave empty batches out"):
        trainer.step({name: array[:0] for name, array in feeds.items()})
    assert trainer.step(feeds) < loss
    assert trainer.updates == 2
    dense = models.build("mlp3", **SIZES)
    feeds = models.random_feeds(dense, 2, np.random.default_rng(0), loss="cross-entropy")
    trainer = Trainer(zilc.emit_training(dense, loss="cross-entropy"), lr=0.1, providers=CPU)
    before = trainer.state
    trainer.step({name: array[:0] for name, array in feeds.items()})
    assert all(np.array_equal(before[name], array) for name, array in trainer.state.items())
