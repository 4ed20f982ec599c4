"""Small models as files, and the command run on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from zilc.__main__ import main

ROOT = Path(__file__).resolve().parent.parent

#: Two matrices around a skip: layer 2 has its input added to its output.
SKIP = """
<ir_version: 10, opset_import: ["" : 18]>
skip (float[N, 3] x) => (float[N, 2] y)
<float[3, 3] w1 = {0.5, -0.25, 1.5, 0.75, -1.0, 0.125, 0.3, 0.6, -0.9}, float[3] b1 = {0.25, -0.5, 0.125},
 float[3, 3] w2 = {-0.5, 0.25, 0.75, 1.25, -0.3, 0.2, 0.45, -0.7, 0.35},
 float[3, 2] w3 = {0.5, 1.5, -0.75, 0.25, 0.4, -0.6}>
{
    [first]  h1 = Gemm (x, w1, b1)
    [bend]   a1 = Tanh (h1)
    [second] h2 = MatMul (a1, w2)
    [join]   s = Add (a1, h2)
    [last]   y = MatMul (s, w3)
}
"""


def write(path: Path, text: str) -> str:
    """A model in ONNX's text syntax as a file; returns its path."""
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return str(path)


@dataclass
class Result:
    """What a command gave."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """``zilc`` in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *argv: str | Path) -> Result:
        self._capfd.readouterr()
        status = main([str(a) for a in argv])
        out, err = self._capfd.readouterr()
        return Result(status, out, err)


def spawn(*argv: str | Path, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """``python -m zilc`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "zilc", *map(str, argv)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}, **options,
    )  # fmt: skip
