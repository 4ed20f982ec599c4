"""Where a derivative does not exist: zilc's emitted gradient beside torch.autograd's, and the table of docs/RULES.md.

    python -m tests.test_kinks          writes the table
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest

import zilc
from tests.vjp.single import cotangents_of

torch = pytest.importorskip("torch")
F = torch.nn.functional

PAGE = Path(__file__).resolve().parent.parent / "docs" / "RULES.md"
BEGIN, END = "<!-- kinks -->\n", "<!-- /kinks -->\n"


@dataclass(frozen=True)
class Kink:
    """A point, and PyTorch's function of the same operands.

    Attributes:
        at: in words.
        twin: of as many tensors as there are floating operands among ``of``; None where PyTorch has no such function.
        name: how the page calls the twin.
        of: operands whose gradients are compared; the cotangent of the output is 1.
        differs: why zilc's choice is not PyTorch's; empty where it is.
    """

    op: str
    at: str
    inputs: Sequence[Any]
    twin: Callable[..., Any] | None
    name: str
    attrs: Mapping[str, Any] = field(default_factory=dict)
    of: Sequence[int] = (0,)
    constant: Sequence[int] = ()
    opset: int = 18
    differs: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.at.replace(' ', '_')}"


INF = math.inf
AXES = np.asarray([0])
#: One channel of a picture with equal maxima in one window.
TIED = [[[[1.0, 3.0], [3.0, 3.0]]]]

KINKS = [
    Kink("Relu", "0", [[0.0]], torch.relu, "relu"),
    Kink("Abs", "0", [[0.0]], torch.abs, "abs"),
    Kink("LeakyRelu", "0 (alpha 0.1)", [[0.0]], lambda x: F.leaky_relu(x, 0.1), "leaky_relu", {"alpha": 0.1}),
    Kink("PRelu", "0 (slope 0.25): x, slope", [[0.0], [0.25]], torch.prelu, "prelu", of=(0, 1)),
    Kink("Elu", "0 (alpha 0.5)", [[0.0]], lambda x: F.elu(x, 0.5), "elu", {"alpha": 0.5}),
    Kink("Selu", "0", [[0.0]], F.selu, "selu"),
    Kink("ThresholdedRelu", "the threshold", [[1.0]], lambda x: F.threshold(x, 1.0, 0.0), "threshold"),
    Kink("HardSigmoid", "its bounds -3, 3", [[-3.0, 3.0]], F.hardsigmoid, "hardsigmoid", {"alpha": 1 / 6}),
    Kink("HardSwish", "-3, 3", [[-3.0, 3.0]], F.hardswish, "hardswish"),
    Kink("Shrink", "-lambd, lambd (hard)", [[-0.5, 0.5]], lambda x: F.hardshrink(x, 0.5), "hardshrink"),
    Kink("Shrink", "-lambd, lambd (soft)", [[-0.5, 0.5]], lambda x: F.softshrink(x, 0.5), "softshrink", {"bias": 0.5}),
    Kink("Clip", "min, max: x, min, max", [[-1.0, 1.0], -1.0, 1.0],
         lambda x, low, high: torch.clamp(x, low, high), "clamp", of=(0, 1, 2)),
    Kink("Max", "equal operands", [[2.0], [2.0]], torch.maximum, "maximum", of=(0, 1)),
    Kink("Min", "equal operands", [[2.0], [2.0]], torch.minimum, "minimum", of=(0, 1)),
    Kink("Max", "three equal operands", [[2.0], [2.0], [2.0]],
         lambda *x: torch.stack(x).amax(0), "stack, amax", of=(0, 1, 2)),
    Kink("ReduceMax", "equal maxima", [[1.0, 3.0, 3.0, 3.0], AXES], lambda x: x.amax(0), "amax"),
    Kink("ReduceMin", "equal minima", [[1.0, 1.0, 3.0, 1.0], AXES], lambda x: x.amin(0), "amin"),
    Kink("MaxPool", "equal maxima", [TIED], lambda x: F.max_pool2d(x, 2), "max_pool2d", {"kernel_shape": [2, 2]}),
    Kink("GlobalMaxPool", "equal maxima", [TIED],
         lambda x: F.adaptive_max_pool2d(x, 1), "adaptive_max_pool2d"),
    Kink("Sqrt", "0", [[0.0]], torch.sqrt, "sqrt"),
    Kink("Log", "0", [[0.0]], torch.log, "log"),
    Kink("Reciprocal", "0", [[0.0]], torch.reciprocal, "reciprocal"),
    Kink("Acos", "1", [[1.0]], torch.acos, "acos"),
    Kink("Pow", "a negative base, exponent 3: base", [[-2.0], [3.0]], lambda x: x**3.0, "pow"),
    Kink("Pow", "a negative base, exponent 3: exponent", [[-2.0], [3.0]],
         lambda y: torch.tensor([-2.0]) ** y, "pow", of=(1,),
         differs="No real derivative exists there; a delayed constant must not spread NaN."),
    Kink("Pow", "0 to the 0, 1/2, 1, 2: base", [[0.0] * 4, [0.0, 0.5, 1.0, 2.0]],
         lambda x: x ** torch.tensor([0.0, 0.5, 1.0, 2.0]), "pow"),
    Kink("Pow", "0 to the 0, 1/2, 1, 2: exponent", [[0.0] * 4, [0.0, 0.5, 1.0, 2.0]],
         lambda y: torch.zeros(4) ** y, "pow", of=(1,)),
    Kink("Mod", "a multiple (fmod): both", [[6.0], [3.0]], torch.fmod, "fmod", {"fmod": 1}, of=(0, 1)),
    Kink("ReduceL1", "an entry 0", [[0.0, -2.0], AXES], lambda x: torch.linalg.vector_norm(x, 1), "vector_norm"),
    Kink("ReduceL2", "norm 0", [[0.0, 0.0], AXES], torch.linalg.vector_norm, "vector_norm"),
    Kink("LpNormalization", "norm 0", [[0.0, 0.0]], None, "", {"p": 2}),
    Kink("LpPool", "norm 0", [[[[[0.0, 0.0], [0.0, 0.0]]]]],
         lambda x: F.lp_pool2d(x, 2.0, 2), "lp_pool2d", {"kernel_shape": [2, 2], "p": 2}),
    Kink("ReduceProd", "one zero, axis of 3", [[0.0, 2.0, 3.0], AXES], torch.prod, "prod"),
    Kink("ReduceProd", "two zeros, axis of 3", [[0.0, 0.0, 3.0], AXES], torch.prod, "prod"),
    Kink("ReduceLogSumExp", "an entry -inf", [[-INF, 1.0, 1.0], AXES], lambda x: x.logsumexp(0), "logsumexp"),
    Kink("ReduceLogSumExp", "every entry -inf", [[-INF, -INF], AXES], lambda x: x.logsumexp(0), "logsumexp",
         differs="A row masked whole must not spread NaN."),
    Kink("LogSoftmax", "an entry -inf", [[-INF, 1.0, 1.0]], lambda x: x.log_softmax(0), "log_softmax"),
    Kink("Sign", "0", [[0.0]], torch.sign, "sign"),
    Kink("Floor", "a whole number", [[2.0]], torch.floor, "floor"),
    Kink("GridSample", "the middle of a pixel: x, grid",
         [[[[[1.0, 2.0, 4.0], [1.0, 3.0, 9.0], [0.0, 5.0, 2.0]]]], [[[[0.0, 0.0]]]]],
         lambda x, grid: F.grid_sample(x, grid, align_corners=True), "grid_sample", {"align_corners": 1}, of=(0, 1)),
    Kink("TopK", "equal entries (k 1)", [[3.0, 3.0, 1.0], np.asarray([1])], None, "", {}),
]  # fmt: skip


def ours(kink: Kink) -> list[np.ndarray]:
    """zilc's gradients, in float32 on onnxruntime; 0 where it says that none flows."""
    inputs = [x if isinstance(x, np.ndarray) else np.asarray(x, np.float32) for x in kink.inputs]
    constant = [k for k, x in enumerate(inputs) if x.dtype.kind == "i"]
    outputs = 2 if kink.op == "TopK" else 1
    found = cotangents_of(kink.op, inputs, kink.attrs, opset=kink.opset, constant=constant, outputs=outputs)
    return [found.get(k, np.zeros_like(inputs[k])) for k in kink.of]


def theirs(kink: Kink) -> list[np.ndarray]:
    """PyTorch's gradients; 0 where the graph of autograd does not reach an operand."""
    assert kink.twin is not None
    given = [torch.tensor(np.asarray(kink.inputs[k], np.float32), requires_grad=True) for k in kink.of]
    y = kink.twin(*given)
    y.backward(torch.ones_like(y))
    return [(torch.zeros_like(x) if x.grad is None else x.grad).numpy() for x in given]


@pytest.mark.parametrize("kink", KINKS, ids=str)
def test_as_in_pytorch(kink: Kink) -> None:
    got = ours(kink)
    if kink.twin is None:
        assert all(np.isfinite(g).all() for g in got)
        return
    same = all(
        np.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True) for a, b in zip(got, theirs(kink), strict=True)
    )
    assert same == (not kink.differs), f"zilc {got}, PyTorch {theirs(kink)}"


#: Scores masked by adding -inf and by choosing it.
MASKED = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[2,3,4] q, float[2,5,4] k, float[2,5,4] v, {kind}[2,1,5] mask) => (float[2,3,4] y)
    <float low = {{-inf}}>
    {{
        t = Transpose<perm = [0, 2, 1]>(k)
        r = MatMul(q, t)
        s = {masked}
        p = Softmax<axis = -1>(s)
        y = MatMul(p, v)
    }}"""


@pytest.mark.parametrize(
    ("kind", "masked"), [("float", "Add(r, mask)"), ("bool", "Where(mask, r, low)")], ids=["added", "chosen"]
)
def test_masked_attention_and_padding(kind: str, masked: str) -> None:
    """Keys behind the mask get exactly 0, and nothing is NaN: as in PyTorch."""
    rng = np.random.default_rng(3)
    keep = np.asarray([[[True, True, True, False, False]], [[True, False, False, False, False]]])
    shapes = {"q": (2, 3, 4), "k": (2, 5, 4), "v": (2, 5, 4), "target": (2, 3, 4)}
    feeds = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    feeds["mask"] = keep if kind == "bool" else np.where(keep, 0, -INF).astype(np.float32)
    text = MASKED.format(kind=kind, masked=masked).replace("-inf", "-1")
    model = onnx.parser.parse_model(text)
    for held in model.graph.initializer:
        held.CopyFrom(onnx.numpy_helper.from_array(np.asarray(-INF, np.float32), "low"))
    step = zilc.emit_training(model, outputs="grad", wrt=["q", "k", "v"])
    session = onnxruntime.InferenceSession(step.model.SerializeToString(), providers=["CPUExecutionProvider"])
    leaves = {i["name"]: i["grad"] for i in step.signature["input_grads"]}
    got = dict(zip(leaves, session.run(list(leaves.values()), feeds), strict=True))
    q, k, v = (torch.tensor(feeds[n], requires_grad=True) for n in "qkv")
    scores = (q @ k.transpose(1, 2)).masked_fill(~torch.tensor(keep), -INF)
    (0.5 * ((scores.softmax(-1) @ v - torch.tensor(feeds["target"])) ** 2).sum()).backward()
    for name, x in (("q", q), ("k", k), ("v", v)):
        np.testing.assert_allclose(got[name], x.grad.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
    for name in "kv":
        np.testing.assert_array_equal(got[name][~keep[:, 0]], 0)


def _numbers(arrays: Sequence[np.ndarray]) -> str:
    def number(v: float) -> str:
        if math.isnan(v):
            return "NaN"
        for k in (2, 3):
            if math.isfinite(v) and abs(v - round(v)) > 1e-3 and abs(v * k - round(v * k)) < 1e-5:
                return f"{round(v * k)}/{k}"
        return f"{v + 0.0:.4g}"  # no -0

    return "; ".join(", ".join(number(float(v)) for v in a.ravel()) for a in arrays)


def table() -> str:
    """What stands between the marks in docs/RULES.md."""
    lines = ["| operator | at | zilc's derivative | PyTorch |", "| --- | --- | --- | --- |"]
    for kink in KINKS:
        beside = "has none such"
        if kink.twin is not None:
            beside = f"`{kink.name}`: the same"
            if kink.differs:
                beside = f"`{kink.name}`: {_numbers(theirs(kink))}. {kink.differs}"
        lines.append(f"| {kink.op} | {kink.at} | {_numbers(ours(kink))} | {beside} |")
    return "\n".join(lines) + "\n"


def test_the_page_says_what_is_emitted() -> None:
    text = PAGE.read_text("utf-8")
    held = re.search(re.escape(BEGIN) + "(.*?)" + re.escape(END), text, re.S)
    assert held is not None
    assert held[1] == table(), "python -m tests.test_kinks writes it"


if __name__ == "__main__":
    before = PAGE.read_text("utf-8")
    start, stop = before.index(BEGIN) + len(BEGIN), before.index(END)
    PAGE.write_text(before[:start] + table() + before[stop:], "utf-8")
