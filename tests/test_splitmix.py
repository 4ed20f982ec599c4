"""The counter-based generator: its published values, the same bits in every runtime, and statistics of its streams."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from zilc import ir, splitmix
from zilc.emit import Emitter
from zilc.executors import executor

WORD = 1 << 64
#: The first five numbers from the state 1234567, as Vigna's splitmix64.c and Java's SplittableRandom give them.
PUBLISHED = [
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
]  # fmt: skip


def mix(z: int) -> int:
    """Stafford's variant 13, in Python's integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def key(*numbers: int) -> int:
    folded = 0
    for number in numbers:
        folded = mix(((folded ^ number % WORD) + splitmix.GAMMA) % WORD)
    return folded


def stream(start: int, count: int) -> np.ndarray:
    return np.array([mix((start + (i + 1) * splitmix.GAMMA) % WORD) for i in range(count)], np.uint64)


def emitted(vertex: int, *, count: int | None) -> onnx.ModelProto:
    """seed, step -> the words of one vertex; ``count`` is an input where it is None."""
    graph = gs.Graph(opset=18)
    op = Emitter(graph)
    seed, step, many = (gs.Variable(name, np.dtype(np.int64), []) for name in ("seed", "step", "count"))
    graph.inputs = [seed, step] if count is not None else [seed, step, many]
    start = splitmix.fold(op, splitmix.fold(op, splitmix.fold(op, None, seed), step), vertex)
    length = many if count is None else op.constant(np.asarray(count, np.int64))
    words = splitmix.words(op, start, length)
    words.name = "words"
    graph.outputs = [words]
    proto = ir.to_proto(graph, infer=True)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def draw(count: int, *, seed: int = 0, step: int = 0, vertex: int = 1) -> np.ndarray:
    run = executor(emitted(vertex, count=count))
    assert run.name.startswith("onnxruntime")
    return run({"seed": np.asarray(seed), "step": np.asarray(step)})["words"]


def test_published_values() -> None:
    graph = gs.Graph(opset=18)
    op = Emitter(graph)
    state = gs.Variable("state", np.dtype(np.uint64), [1])
    graph.inputs = [state]
    words = splitmix.words(op, state, op.constant(np.asarray(5, np.int64)))
    words.name = "words"
    graph.outputs = [words]
    for prefer in ("onnxruntime", "reference"):
        run = executor(ir.to_proto(graph, infer=True), prefer=prefer)
        assert run({"state": np.asarray([1234567], np.uint64)})["words"].tolist() == PUBLISHED
    assert stream(1234567, 5).tolist() == PUBLISHED


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prefer", ["onnxruntime", "reference"])
@pytest.mark.parametrize("count", [1000, None])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 1), (-1, 2**40), (2**63 - 1, 2**63 - 1), (-(2**63), 5)])
def test_the_same_bits_everywhere(prefer: str, count: int | None, seed: int, step: int) -> None:
    vertex = splitmix.constant_of("layer/Dropout_output_0")
    feeds = {"seed": np.asarray(seed), "step": np.asarray(step), "count": np.asarray(1000)}
    words = executor(emitted(vertex, count=count), prefer=prefer)(feeds)["words"]
    assert words.dtype == np.uint64
    assert np.array_equal(words, stream(key(seed, step, vertex), 1000))


def test_a_count_of_zero_and_of_one() -> None:
    run = executor(emitted(3, count=None))
    feeds = {"seed": np.asarray(0), "step": np.asarray(0)}
    assert run({**feeds, "count": np.asarray(0)})["words"].shape == (0,)
    assert np.array_equal(run({**feeds, "count": np.asarray(1)})["words"], stream(key(0, 0, 3), 1))


def test_constants_of_names_do_not_move() -> None:
    """They are part of every mask: the values stand here so that no change goes unseen."""
    assert splitmix.constant_of("y") == int.from_bytes(bytes.fromhex("a1fce4363854ff88"), "little")
    assert splitmix.constant_of("y") != splitmix.constant_of("y_1")


COUNT = 1 << 18
#: A standard normal exceeds 5 once in two million; every statistic below is one where the words are random.
LIMIT = 5.0


def test_words_are_uniform() -> None:
    """Chi-square of the lowest and the highest byte, and the mean of each of the 64 bits."""
    words = draw(COUNT, seed=11)
    for shift in (0, 28, 56):
        counts = np.bincount(((words >> np.uint64(shift)) & np.uint64(255)).astype(np.int64), minlength=256)
        expected = COUNT / 256
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi - 255) / np.sqrt(2 * 255) < LIMIT
    for bit in range(64):
        ones = float(((words >> np.uint64(bit)) & np.uint64(1)).sum())
        assert abs(ones - COUNT / 2) / np.sqrt(COUNT / 4) < LIMIT


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 0.9])
def test_neighbours_are_independent(ratio: float) -> None:
    """Of kept elements: as many as the ratio says, and no correlation with those 1, 2, 64 or 768 places on."""
    kept = (draw(COUNT, seed=5) >= np.uint64(int(ratio * 2**32) << 32)).astype(np.float64)
    deviation = np.sqrt(ratio * (1 - ratio))
    assert abs(kept.mean() - (1 - ratio)) * np.sqrt(COUNT) / deviation < LIMIT
    centred = (kept - (1 - ratio)) / deviation
    for lag in (1, 2, 64, 768):
        assert abs(float((centred[lag:] * centred[:-lag]).sum())) / np.sqrt(COUNT - lag) < LIMIT


@pytest.mark.parametrize("what", ["seed", "step", "vertex"])
def test_streams_are_independent(what: str) -> None:
    """Neighbouring seeds, steps and vertices: no bit of one stream goes with that bit of another, shifted or not."""
    streams = [draw(COUNT, **{what: n}) for n in (0, 1, 2, 3)]
    for first in range(4):
        for second in range(first):
            for lag in (0, 1):
                a, b = streams[first][lag:], streams[second][: COUNT - lag]
                for bit in (0, 31, 63):
                    differ = float((((a ^ b) >> np.uint64(bit)) & np.uint64(1)).sum())
                    assert abs(differ - len(a) / 2) / np.sqrt(len(a) / 4) < LIMIT


def test_one_bit_of_the_seed_changes_half_of_all_bits() -> None:
    words = draw(4096, seed=0)
    for bit in (0, 17, 62):
        differ = np.unpackbits((words ^ draw(4096, seed=1 << bit)).view(np.uint8)).mean()
        assert abs(differ - 0.5) * np.sqrt(4096 * 64 * 4) < LIMIT
