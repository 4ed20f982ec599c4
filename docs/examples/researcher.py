"""A PyTorch network of your own under predictive coding: its levels, the wave of prediction errors, a figure.

    pip install 'zilc[plot]' torch onnxscript
    python docs/examples/researcher.py [FOLDER]

Everything after the export is about the ONNX file: replace ``Mine`` by your network and ``batch`` by your data.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import onnxruntime
import torch
from torch import nn

import zilc

matplotlib.use("svg")
import matplotlib.pyplot as plt


class Mine(nn.Module):
    """Two gated blocks with a skip around each, and a readout."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.readout = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for inner, gate in zip(self.inner, self.gate, strict=True):
            x = x + torch.tanh(inner(x)) * torch.sigmoid(gate(x))
        return self.readout(x)


def batch(size: int = 8, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels."""
    made = torch.Generator().manual_seed(1)
    return torch.randn(size, width, generator=made).double(), torch.randint(0, 4, (size,), generator=made)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    # float64, so that rounding hides nothing; leave out .double() for float32.
    network, (x, labels) = Mine().double(), batch()

    # 1. PyTorch -> ONNX. The file is all that zilc sees.
    path = folder / "mine.onnx"
    program = torch.onnx.export(network, (x,), input_names=["x"], output_names=["logits"], dynamo=True, verbose=False)
    program.save(path)
    data = {"x": x.numpy(), "target": labels.numpy()}

    # 2. Levels: how far each vertex is from the output, where skips need identity vertices, when parameters learn.
    levelled = zilc.levelize(path)
    report = levelled.report
    print(f"K = {report['levels']}, {report['vertices']} vertices")
    for placement, cost in report["identities"].items():
        print(f"identities, {placement}: {cost['vertices']}")
    for leaf in report["leaves"]:
        if leaf["trained"]:
            print(f"{leaf['name']:16} level {leaf['level']:2}, learns in step {leaf['update_step']}")

    # 3. One update's gradients by Z-IL beside PyTorch's autograd: not close, but the same up to rounding.
    print(f"Z-IL from autograd, relative, largest: {from_autograd(path, network, x, labels):.1e}")

    # 4. Traces: every vertex's prediction error in every inference step, for Z-IL and for inference learning.
    zil = zilc.trace(path, data=data, loss="cross-entropy")
    il = zilc.trace(path, data=data, loss="cross-entropy", algorithm="il", steps=2 * report["levels"], gamma=0.1)
    zil.save(folder / "mine.zil.npz")
    il.save(folder / "mine.il.npz")

    # 5. The figure: Z-IL's wave moves one level a step and leaves every level behind it wrong; IL's errors seep.
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=(1, 2))
    for axis, run, title in zip(axes, (zil, il), ("Z-IL", "inference learning"), strict=True):
        errors = run.by_level("error").T  # [level, step]
        with np.errstate(divide="ignore", invalid="ignore"):
            shown = np.ma.masked_invalid(np.log10(errors))
        image = axis.imshow(shown, origin="lower", aspect="auto", vmin=-6, vmax=1, cmap="viridis")
        axis.set(title=title, xlabel="inference step t", ylabel="level")
    for level, t in zil.parameters.values():
        axes[0].plot(t, level, "s", mfc="none", mec="tab:red", ms=9)  # a parameter learns here
    figure.colorbar(image, ax=axes, label="log$_{10}$ of the prediction error's norm")
    figure.savefig(folder / "mine.svg")
    print(f"written: {folder / 'mine.svg'}")


def from_autograd(path: Path, network: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    """The largest relative divergence of a parameter's Z-IL gradient from PyTorch's."""
    step = zilc.emit_training(path, loss="cross-entropy", outputs="grad")
    session = onnxruntime.InferenceSession(step.model.SerializeToString(), providers=["CPUExecutionProvider"])
    parameters = step.signature["parameters"]
    feeds = {"x": x.numpy(), "target": labels.numpy(), **{p["name"]: step.state[p["name"]] for p in parameters}}
    found = dict(zip([p["name"] for p in parameters], session.run([p["grad"] for p in parameters], feeds), strict=True))
    nn.functional.cross_entropy(network(x), labels).backward()
    truth = {name: parameter.grad.numpy() for name, parameter in network.named_parameters()}
    assert found.keys() == truth.keys()
    return max(float(np.linalg.norm(found[n] - g) / np.linalg.norm(g)) for n, g in truth.items())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "mine"))
