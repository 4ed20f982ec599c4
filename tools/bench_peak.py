"""What the device reaches at best, for tools/bench.py: one large matrix product in PyTorch, by precision.

``python bench_peak.py DEVICE PRECISION …`` prints JSON: operations a second in 1e9, and the device by name.  A process
of its own, so that nothing stays on the device.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

#: Rows and columns.
SIZE = {"cuda": 8192, "cpu": 512}
RUNS = 7


def rate(device: str, precision: str) -> float:
    """GFLOP/s of the product; TF32 stays off."""
    size = SIZE[device]
    make = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(size, size, device=device, generator=make).to(getattr(torch, precision)) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = False
    times = []
    for _ in range(RUNS + 2):
        start = time.perf_counter()
        torch.matmul(x, w)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(times[2:]) / 1e9


def main() -> None:
    device, *precisions = sys.argv[1:]
    made: dict[str, object] = {"peak_gflops": {precision: rate(device, precision) for precision in precisions}}
    if device == "cuda":
        made |= {
            "GPU": torch.cuda.get_device_name(), "CUDA of PyTorch": torch.version.cuda,
            "cuDNN of PyTorch": torch.backends.cudnn.version(),
        }  # fmt: skip
    print(json.dumps(made))


if __name__ == "__main__":
    main()
