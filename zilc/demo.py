"""The demo: a small convolutional network with skips learns handwritten digits with Z-IL, in onnxruntime.

Beside the training it measures: gradients of Z-IL against emitted reverse mode, bit by bit, and against a reverse
mode of this one network written out in NumPy, which shares nothing with the compiler.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

from zilc import models, onnx_io
from zilc.errors import FileError, RuntimeMissing
from zilc.executors import executor
from zilc.files import save_step
from zilc.pipeline import TrainingStep, emit_training, levelize
from zilc.providers import import_onnxruntime
from zilc.runtime import Trainer

EPOCHS, BATCH, RATE = 30, 32, 3e-3
#: Test images of each digit: 360 in all, 1437 are left for training.
HELD_OUT = 36
#: Chance that an image is moved by one pixel each way along each axis.
SHIFT = 0.2
#: Images in the batch on which gradients are compared.
COMPARED = 64

Arrays = dict[str, np.ndarray]


def run(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    say: Callable[[str], None] = print,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Build, levelize, emit, compare, train and check; every model is written to ``folder``.

    Args:
        seed: of initial parameters, order and shifts; the split of the data is fixed.
        say: takes lines of text.
        advance: called with (done, total) updates.

    Raises:
        RuntimeMissing: scikit-learn is not installed.
        FileError: the folder cannot be made, or a file not written.
    """
    begun = time.perf_counter()
    train, test = digits()
    place = _folder(folder)
    model = models.build("digits", seed=seed)
    paths = {name: place / f"digits.{name}" for name in ("onnx", "levelled.onnx", "step.onnx", "step.safetensors",
                                                         "trained.onnx", "train.npz", "test.npz")}  # fmt: skip
    onnx_io.save(model, paths["onnx"])
    for name, arrays in (("train.npz", train), ("test.npz", test)):
        with onnx_io.atomic_write(paths[name]) as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]
    say(f"data        {len(train['target'])} images of handwritten digits to train on, {len(test['target'])} to test")

    levelled = levelize(model)
    onnx_io.save(levelled.model, paths["levelled.onnx"])
    step = emit_training(model, loss="cross-entropy", optimizer="adam")
    save_step(step, paths["step.onnx"], paths["step.safetensors"])
    structure = _structure(levelled.report)
    say(f"network     {len(step.signature['parameters'])} parameters, {_size(step):,} numbers; {structure}")
    say(f"step        {len(step.model.graph.node)} nodes, all standard ONNX operators")

    found = compare(model, {name: array[:COMPARED] for name, array in train.items()}, seed)
    say(f"gradients   on {COMPARED} images, all {found['numbers']:,} numbers")
    say(f"            Z-IL and emitted reverse mode: divergence {found['bp']:g} ({_bits(found)})")
    say(
        f"            Z-IL and independent NumPy reverse mode: {found['float32']:.1e} in float32, "
        f"{found['float64']:.1e} in float64"
    )

    trainer = Trainer(step, lr=RATE, providers=["CPUExecutionProvider"])
    history = _train(trainer, train, test, seed, say, advance)
    trainer.export(paths["trained.onnx"])
    right = _right(paths["trained.onnx"], test)
    count = len(test["target"])
    seconds = time.perf_counter() - begun
    say(f"test        {right} of {count} right, {right / count:.2%}: {paths['trained.onnx']} in plain onnxruntime")
    say(f"time        {seconds:.1f} s")
    for path in paths.values():
        say(f"written     {path}")
    say("")
    say("Try next:")
    for command in _next(paths):
        say(f"    {command}")
    return {
        "seed": seed,
        "levels": levelled.report["levels"],
        "identities": {k: v["vertices"] for k, v in levelled.report["identities"].items()},
        "divergence": found,
        "history": history,
        "right": right,
        "images": count,
        "accuracy": right / count,
        "seconds": seconds,
        "written": {name: str(path) for name, path in paths.items()},
    }


# --- data -----------------------------------------------------------------------------------------------------


def digits() -> tuple[Arrays, Arrays]:
    """Training and test images with their labels: scikit-learn's digits, the same 36 of each class held out.

    Raises:
        RuntimeMissing: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeMissing(
            "scikit-learn, which holds the digits, is not installed",
            where="zilc demo",
            hint="pip install 'zilc[demo]'",
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    labels = labels.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    # Within each class, its first images of the shuffled order are held out.
    held = np.concatenate([order[labels[order] == digit][:HELD_OUT] for digit in range(10)])
    kept = order[~np.isin(order, held)]
    return tuple({"image": images[pick], "target": labels[pick]} for pick in (kept, held))  # type: ignore[return-value]


def _batches(data: Arrays, rng: np.random.Generator) -> Iterator[Arrays]:
    """An epoch in random order, some images moved by a pixel; what leaves the frame is lost."""
    images, labels = data["image"], data["target"]
    order = rng.permutation(len(labels))
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    shifts = rng.choice(3, p=[SHIFT, 1 - 2 * SHIFT, SHIFT], size=(len(labels), 2))
    moved = np.empty_like(images)
    for down in range(3):
        for right in range(3):
            pick = (shifts == (down, right)).all(axis=1)
            moved[pick] = padded[pick, :, down : down + 8, right : right + 8]
    for start in range(0, len(order), BATCH):
        pick = order[start : start + BATCH]
        yield {"image": moved[pick], "target": labels[pick]}


# --- training -------------------------------------------------------------------------------------------------


def _train(
    trainer: Trainer, train: Arrays, test: Arrays, seed: int, say: Callable[[str], None],
    advance: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Adam, its learning rate falling to zero along a cosine; a line every fifth epoch."""
    total = EPOCHS * math.ceil(len(train["target"]) / BATCH)
    say(f"training    {EPOCHS} epochs, {total} updates of {BATCH} images, Adam, in onnxruntime")
    history = []
    for epoch in range(1, EPOCHS + 1):
        loss = 0.0
        for feeds in _batches(train, np.random.default_rng([seed, epoch])):
            trainer.lr = RATE * 0.5 * (1 + math.cos(math.pi * trainer.updates / total))
            loss += trainer.step(feeds) * len(feeds["target"]) / len(train["target"])
            if advance is not None:
                advance(trainer.updates, total)
        entry = {"epoch": epoch, "loss": loss}
        if epoch % 5 == 0:
            guess = trainer.evaluate(test).predictions["logits"].argmax(axis=1)
            entry["test_accuracy"] = float(np.mean(guess == test["target"]))
            say(f"            epoch {epoch:2}  loss {loss:.4f}  test accuracy {entry['test_accuracy']:.2%}")
        history.append(entry)
    return history


def _right(path: Path, test: Arrays) -> int:
    """How many test images a model file gets right, in an onnxruntime session of its own."""
    ort = import_onnxruntime()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": test["image"]})
    return int(np.count_nonzero(logits.argmax(axis=1) == test["target"]))


# --- comparison -----------------------------------------------------------------------------------------------


def compare(model: onnx.ModelProto, batch: Arrays, seed: int) -> dict[str, Any]:
    """Divergence of Z-IL's gradients on a batch, the largest over the parameters.

    ``bp``: from emitted reverse mode, zero where all bits agree.  ``float32`` and ``float64``: from
    :func:`reverse_mode` in float64, with the training graph in that precision.  For these two the pixels are shaken a
    little: even ground ties the windows of a pooling, and rounding, not the rule, would choose among them.
    """
    zil = _gradients(model, batch, "zil")
    bp = _gradients(model, batch, "bp")
    noise = np.random.default_rng(seed).standard_normal(batch["image"].shape)
    image = (batch["image"] + 0.01 * noise).astype(np.float32)
    parameters = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    truth = reverse_mode(parameters, image, batch["target"])
    single = _gradients(model, {**batch, "image": image}, "zil")
    double = models.build("digits", seed=seed, dtype="float64")
    exact = _gradients(double, {**batch, "image": image.astype(np.float64)}, "zil")
    return {
        "numbers": sum(g.size for g in zil.values()),
        "bits_equal": all(zil[name].tobytes() == bp[name].tobytes() for name in bp),
        "bp": divergence(zil, bp),
        "float32": divergence(single, truth),
        "float64": divergence(exact, truth),
    }


def _gradients(model: onnx.ModelProto, batch: Arrays, algorithm: Any) -> Arrays:
    step = emit_training(model, loss="cross-entropy", outputs="grad", algorithm=algorithm)
    made = executor(step.model)({**step.state, **batch})
    return {entry["name"]: made[entry["grad"]] for entry in step.signature["parameters"]}


def divergence(found: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> float:
    """||a - b|| / max(||b||, 1e-6 of the largest gradient), the largest over the parameters (ZIL.md, section 8)."""
    norms = {name: float(np.linalg.norm(g.astype(np.float64))) for name, g in truth.items()}
    floor = 1e-6 * max(norms.values())
    return max(
        float(np.linalg.norm(found[name].astype(np.float64) - g)) / max(norms[name], floor) for name, g in truth.items()
    )


def reverse_mode(parameters: Mapping[str, np.ndarray], image: np.ndarray, labels: np.ndarray) -> Arrays:
    """Gradients of the mean cross-entropy of the digits network, by hand, in float64.

    Each stage:  h = relu(conv_a(x)),  s = h + conv_b(h),  pooled = maxpool(relu(s));  then a linear layer.
    """
    p = {name: value.astype(np.float64) for name, value in parameters.items()}
    x = image.astype(np.float64)
    trail = []
    for a, b in (("conv1", "conv2"), ("conv3", "conv4")):
        h = np.maximum(_conv(x, p[f"{a}.weight"]) + p[f"{a}.bias"][:, None, None], 0)
        s = np.maximum(h + _conv(h, p[f"{b}.weight"]) + p[f"{b}.bias"][:, None, None], 0)
        n, c, rows, columns = s.shape
        blocks = s.reshape(n, c, rows // 2, 2, columns // 2, 2).swapaxes(3, 4).reshape(n, c, rows // 2, columns // 2, 4)
        # Even ground makes equal maxima: the first of a block, row by row, takes it all.
        chosen = (np.arange(4) == blocks.argmax(axis=-1)[..., None]) & (blocks > 0)
        trail.append((a, b, x, h, chosen))
        x = blocks.max(axis=-1)
    flat = x.reshape(len(x), -1)
    logits = flat @ p["output.weight"].T + p["output.bias"]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    g = odds / odds.sum(axis=1, keepdims=True)
    g[np.arange(len(labels)), labels] -= 1
    g /= len(labels)
    found = {"output.weight": g.T @ flat, "output.bias": g.sum(axis=0)}
    g = (g @ p["output.weight"]).reshape(x.shape)
    for a, b, x, h, chosen in reversed(trail):
        n, c, rows, columns = g.shape
        g = (chosen * g[..., None]).reshape(n, c, rows, columns, 2, 2).swapaxes(3, 4).reshape(h.shape)
        found[f"{b}.weight"], found[f"{b}.bias"] = _conv_weight(h, g), g.sum(axis=(0, 2, 3))
        g = (g + _conv_input(g, p[f"{b}.weight"])) * (h > 0)
        found[f"{a}.weight"], found[f"{a}.bias"] = _conv_weight(x, g), g.sum(axis=(0, 2, 3))
        g = _conv_input(g, p[f"{a}.weight"])
    return found


def _windows(x: np.ndarray) -> np.ndarray:
    """Every 3 x 3 window of x padded by one: (n, c, rows, columns, 3, 3)."""
    return np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))


def _conv(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.tensordot(_windows(x), weight, axes=((1, 4, 5), (1, 2, 3))), -1, 1)


def _conv_weight(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    return np.tensordot(g, _windows(x), axes=((0, 2, 3), (0, 2, 3)))


def _conv_input(g: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return _conv(g, weight[:, :, ::-1, ::-1].swapaxes(0, 1))


# --- text -----------------------------------------------------------------------------------------------------


def _folder(folder: str | os.PathLike[str]) -> Path:
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"cannot be made ({error.strerror or error})", where=str(folder), hint="Choose another folder with -o."
        ) from error
    return place


def _size(step: TrainingStep) -> int:
    return sum(math.prod(entry["shape"]) for entry in step.report["trained"])


def _structure(report: Mapping[str, Any]) -> str:
    edge, shared = (report["identities"][key]["vertices"] for key in ("edge", "shared"))
    text = f"K = {report['levels']}, {report['vertices']} vertices, identities {edge} by edge and {shared} shared"
    if report["skips"]:
        skip = report["skips"][0]
        text += f"; longest skip {skip['from']} -> {skip['to']}"
    return text


def _bits(found: Mapping[str, Any]) -> str:
    return "every bit equal" if found["bits_equal"] else "bits differ"


def _next(paths: Mapping[str, Path]) -> list[str]:
    at = {name: shlex.quote(str(path)) for name, path in paths.items()}
    again = shlex.quote(str(paths["trained.onnx"].with_name("digits.again.onnx")))
    command = _program()
    return [
        f"{command} levelize {at['onnx']}",
        f"{command} verify {at['onnx']} --loss cross-entropy --precision float64",
        f"{command} train {at['onnx']} --data {at['train.npz']} --val {at['test.npz']} --loss cross-entropy"
        f" --optimizer adam --lr 0.001 --epochs 5 --batch-size 32 -o {again}",
        f"netron {at['step.onnx']}    # pip install netron",
    ]


def _program() -> str:
    """What to type for this ``zilc``: its name if the shell finds it, else its path."""
    if shutil.which("zilc"):
        return "zilc"
    beside = Path(sys.executable).with_name("zilc")
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m zilc"
    return shlex.quote(min(str(beside), os.path.relpath(beside), key=len))
