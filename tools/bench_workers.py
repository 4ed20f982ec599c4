"""One peer of tools/bench.py in a process of its own: commands on stdin, JSON on stdout.

``python bench_workers.py PEER NETWORK BATCH THREADS`` prints ``{"ready": …}``, then for each line ``run N`` the
milliseconds of N training steps, and for ``end`` its peak memory.  One process a peer keeps one runtime's waiting
threads and allocator out of another's measurement.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

Step = Callable[[], Any]


def zilc_step(network: str, batch: int, threads: int, algorithm: Literal["zil", "bp"]) -> tuple[Step, dict[str, Any]]:
    """zilc's training graph in ONNX Runtime: loss, gradients and SGD update, the loss read back."""
    import zilc
    from zilc import models
    from zilc.runtime import Trainer

    model = models.build(network, batch=batch)
    step = zilc.emit_training(model, loss="cross-entropy", algorithm=algorithm)
    trainer = Trainer(step, lr=0.01)
    feeds = models.random_feeds(model, batch, np.random.default_rng(0), loss="cross-entropy")
    return lambda: trainer.step(feeds), {"operators": operators(step.model), "provider": trainer.providers[0]}


def operators(model: Any) -> dict[str, int]:
    """What ONNX Runtime runs after its own optimisation, by operator."""
    import collections
    import tempfile
    from pathlib import Path

    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        made = onnx.load(options.optimized_model_filepath)
    return dict(sorted(collections.Counter(node.op_type for node in made.graph.node).items()))


def torch_step(network: str, batch: int, threads: int, compiled: bool) -> tuple[Step, dict[str, Any]]:
    """PyTorch: zero_grad, forward, loss, backward, SGD step, the loss read back."""
    import torch
    from bench_torch import build  # type: ignore[import-not-found]
    from torch.nn import functional

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = build(network)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    shapes = {"alexnet": (batch, 3, 224, 224), "resnet18": (batch, 3, 224, 224), "rnn": (batch, 28, 128)}
    if network == "transformer":
        x, y = torch.randint(0, 28782, (batch, 35)), torch.randint(0, 28782, (batch, 35))
    else:
        x = torch.randn(shapes.get(network, (batch, 784)))
        y = torch.randint(0, {"alexnet": 1000, "resnet18": 1000, "rnn": 128}.get(network, 10), (batch,))
    forward = torch.compile(net) if compiled else net

    def step() -> float:
        optimizer.zero_grad()
        out = forward(x)
        loss = functional.cross_entropy(out.flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, {"torch": torch.__version__}


PEERS: dict[str, Callable[[str, int, int], tuple[Step, dict[str, Any]]]] = {
    "zilc": lambda n, b, t: zilc_step(n, b, t, "zil"),
    "zilc-bp": lambda n, b, t: zilc_step(n, b, t, "bp"),
    "torch": lambda n, b, t: torch_step(n, b, t, False),
    "torch-compile": lambda n, b, t: torch_step(n, b, t, True),
}


def main() -> None:
    peer, network, batch, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    try:
        step, facts = PEERS[peer](network, batch, threads)
        step()
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        print(json.dumps({"failed": f"{type(error).__name__}: {''.join(reason)}"}), flush=True)
        return
    print(json.dumps({"ready": facts}), flush=True)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "end":
            break
        times = []
        for _ in range(int(words[1])):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        print(json.dumps(times), flush=True)
    print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)


if __name__ == "__main__":
    main()
