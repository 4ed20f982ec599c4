"""State files: round trips for every dtype, the same bytes as the format's own library reads, and clear refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from zilc import checkpoint
from zilc.errors import DataError, FileError

DIGEST = "ab" * 32
STATE = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "w.exp_avg": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "step": np.asarray(7, np.int64),
    "half": np.asarray([1.5, -2.0], np.float16),
    "mask": np.asarray([True, False, True]),
    "none": np.zeros((0, 4), np.float32),
    "größe": np.asarray([1, 2], np.uint8),
    "big": np.arange(3, dtype=">f4"),
}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, STATE, DIGEST)
    for found in (checkpoint.load_state(path, DIGEST), checkpoint.load_state(path), safetensors.numpy.load_file(path)):
        assert found.keys() == STATE.keys()
        for name, array in STATE.items():
            assert found[name].dtype == array.dtype.newbyteorder("=")
            assert found[name].shape == array.shape
            np.testing.assert_array_equal(found[name], array)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_loaded_arrays_may_be_written(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, STATE, DIGEST)
    found = checkpoint.load_state(path)
    found["w"][...] = 0
    assert checkpoint.load_state(path)["w"].any()


def test_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    array = np.asarray([1.0, -0.5, 3e38], ml_dtypes.bfloat16)
    checkpoint.save_state(path, {"w": array}, DIGEST)
    found = checkpoint.load_state(path)["w"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_the_state_decides_the_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    checkpoint.save_state(one, STATE, DIGEST)
    checkpoint.save_state(two, dict(reversed(STATE.items())), DIGEST)
    assert one.read_bytes() == two.read_bytes()


def test_lazy_arrays_are_read_one_at_a_time(tmp_path: Path) -> None:
    class Lazy(Mapping[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            asked.append(name)
            return STATE[name]

        def __iter__(self) -> Iterator[str]:
            return iter(STATE)

        def __len__(self) -> int:
            return len(STATE)

    asked: list[str] = []
    checkpoint.save_state(tmp_path / "state", Lazy(), DIGEST)
    assert sorted(asked) == sorted([*STATE, *STATE])
    np.testing.assert_array_equal(checkpoint.load_state(tmp_path / "state")["w"], STATE["w"])


def test_another_graph(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, STATE, DIGEST)
    with pytest.raises(DataError, match=r"state of another training graph \(abababababab…, expected cdcdcdcdcdcd…\)"):
        checkpoint.load_state(path, "cd" * 32)
    safetensors.numpy.save_file({"w": STATE["w"]}, path)
    assert checkpoint.load_state(path).keys() == {"w"}
    with pytest.raises(DataError, match=r"no 'zilc\.graph' in its metadata: not the state of a training graph"):
        checkpoint.load_state(path, DIGEST)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_cut_short(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, STATE, DIGEST)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match=r"state\.safetensors: not a safetensors file, or cut short .* Copy it again"):
        checkpoint.load_state(path)


def test_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no state at all, only text that goes on for a while\n" * 9)
    with pytest.raises(FileError, match="not a safetensors file"):
        checkpoint.load_state(tmp_path / "text")
    with pytest.raises(FileError, match=r"none: no such file\. Check the path"):
        checkpoint.load_state(tmp_path / "none")
    with pytest.raises(FileError, match="is a folder"):
        checkpoint.load_state(tmp_path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'w' holds complex64, which a state file cannot hold"):
        checkpoint.save_state(tmp_path / "state", {"w": np.zeros(2, np.complex64)}, DIGEST)
    with pytest.raises(FileError, match="cannot be written"):
        checkpoint.save_state(tmp_path / "missing" / "state", STATE, DIGEST)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    class Failing(dict[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            self.reads = getattr(self, "reads", 0) + 1
            if self.reads > len(self):  # the second reading, when data are being written
                raise OSError(28, "No space left on device")
            return super().__getitem__(name)

    path = tmp_path / "state"
    checkpoint.save_state(path, {"w": STATE["w"]}, DIGEST)
    before = path.read_bytes()
    with pytest.raises(FileError, match="No space left on device"):
        checkpoint.save_state(path, Failing(STATE), DIGEST)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_the_place_beside_a_graph() -> None:
    assert checkpoint.state_path("folder/step.onnx") == Path("folder/step.safetensors")


def test_arrays_are_aligned(tmp_path: Path) -> None:
    """Readers map the file, so each array starts at a multiple of its element's size."""
    path = tmp_path / "state"
    state = {"a": np.ones(3, np.uint8), "b": np.ones(3, np.float64), "c": np.ones(3, np.int16)}
    checkpoint.save_state(path, state, DIGEST)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header = json.loads(data[8 : 8 + size])
    assert [header[name]["data_offsets"] for name in "bca"] == [[0, 24], [24, 30], [30, 33]]
