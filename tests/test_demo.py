"""The demo: what it measures, what it writes, and that its network learns."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.command import Command
from zilc import demo, models
from zilc.__main__ import main


def test_split_is_fixed_and_stratified() -> None:
    train, test = demo.digits()
    assert len(train["target"]) == 1437
    assert np.bincount(test["target"]).tolist() == [36] * 10
    assert train["image"].shape == (1437, 1, 8, 8)
    assert train["image"].dtype == np.float32
    assert (train["image"].min(), train["image"].max()) == (0.0, 1.0)
    again, _ = demo.digits()
    assert np.array_equal(train["target"], again["target"])
    both = np.concatenate([train["image"], test["image"]]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797  # no image is on both sides


def test_shifts_move_by_a_pixel_at_most() -> None:
    image = np.zeros((200, 1, 8, 8), np.float32)
    image[:, 0, 3, 4] = 1
    data = {"image": image, "target": np.arange(200)}
    batches = list(demo._batches(data, np.random.default_rng(0)))
    moved = np.concatenate([b["image"] for b in batches])
    assert sorted(np.concatenate([b["target"] for b in batches])) == list(range(200))
    rows, columns = np.nonzero(moved[:, 0])[1:]
    assert set(rows) == {2, 3, 4}
    assert set(columns) == {3, 4, 5}
    assert moved.sum() == 200


@pytest.mark.parametrize("seed", range(3))
def test_reverse_mode_by_hand_is_an_independent_witness(seed: int) -> None:
    """Central differences of the NumPy forward pass alone, along random directions; error about h^2."""
    rng = np.random.default_rng(seed)
    model = models.build("digits", channels=3, seed=seed)
    parameters = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    image, labels = rng.random((4, 1, 8, 8)), rng.integers(0, 10, 4)

    def loss(values: dict[str, np.ndarray]) -> float:
        x = image
        for a, b in (("conv1", "conv2"), ("conv3", "conv4")):
            h = np.maximum(_conv(x, values[f"{a}.weight"], values[f"{a}.bias"]), 0)
            s = np.maximum(h + _conv(h, values[f"{b}.weight"], values[f"{b}.bias"]), 0)
            x = np.maximum.reduce([s[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])
        z = x.reshape(4, -1) @ values["output.weight"].T + values["output.bias"]
        return float(np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(4), labels]))

    found = demo.reverse_mode(parameters, image, labels)
    assert set(found) == set(parameters)
    h = 1e-6
    for name, value in parameters.items():
        v = rng.standard_normal(value.shape)
        v /= np.linalg.norm(v)
        slope = (loss({**parameters, name: value + h * v}) - loss({**parameters, name: value - h * v})) / (2 * h)
        assert abs(slope - np.sum(found[name] * v)) <= 1e-7 * max(1.0, float(np.linalg.norm(found[name])))


def _conv(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows, columns = x.shape[2:]
    taps = [(i, j, padded[:, :, i : i + rows, j : j + columns]) for i in range(3) for j in range(3)]
    return sum(np.einsum("ncyx,oc->noyx", part, w[:, :, i, j]) for i, j, part in taps) + b[:, None, None]


def test_demo(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command: exact gradients, at least 97 % of the test images, files that load."""
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/zilc")
    folder = tmp_path / "some folder"
    result = Command(capfd)("demo", "-o", folder)
    assert result.status == 0
    assert result.err == ""
    assert "Z-IL and emitted reverse mode: divergence 0 (every bit equal)" in result.out
    numbers = re.search(r"NumPy reverse mode: (\S+) in float32, (\S+) in float64", result.out)
    assert numbers is not None
    assert float(numbers[1]) <= 5e-6
    assert float(numbers[2]) <= 1e-12
    right = re.search(r"^test +(\d+) of 360 right", result.out, re.MULTILINE)
    assert right is not None
    assert int(right[1]) >= 0.97 * 360
    names = ["onnx", "levelled.onnx", "step.onnx", "step.safetensors", "trained.onnx", "train.npz", "test.npz"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"digits.{name}" for name in names)
    for name in names:
        assert f"written     {folder / f'digits.{name}'}\n" in result.out
        if name.endswith("onnx"):
            onnx.checker.check_model(onnx.load(folder / f"digits.{name}"), full_check=True)
    # What it proposes to try next works, with the paths as printed.
    proposed = [shlex.split(line, comments=True) for line in result.out.split("Try next:\n")[1].splitlines()]
    assert [argv[:2] for argv in proposed[:3]] == [["zilc", "levelize"], ["zilc", "verify"], ["zilc", "train"]]
    assert proposed[3:] == [["netron", str(folder / "digits.step.onnx")]]
    for argv in proposed[:3]:
        assert main(argv[1:]) == 0
    assert "val_accuracy" in capfd.readouterr().out


@pytest.mark.long
def test_five_seeds(tmp_path: Path) -> None:
    found = [demo.run(tmp_path / str(seed), seed=seed, say=lambda _: None) for seed in range(5)]
    assert all(f["divergence"]["bits_equal"] for f in found)
    assert min(f["accuracy"] for f in found) >= 0.97
    assert sorted(f["accuracy"] for f in found)[2] >= 0.98


def test_same_seed_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPOCHS", 1)
    for name in ("a", "b"):
        demo.run(tmp_path / name, seed=3, say=lambda _: None)
    for file in ("digits.onnx", "digits.step.onnx", "digits.train.npz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_folder_that_cannot_be_made(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = Command(capfd)("demo", "-o", tmp_path / "file" / "demo")
    assert result.status == 1
    assert result.err == (
        f"zilc: error: {tmp_path / 'file' / 'demo'}: cannot be made (Not a directory). Choose another folder with -o.\n"
    )
