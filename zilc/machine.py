"""The machine that a measurement was taken on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def processor() -> str:
    """The processor's name, as Linux has it; elsewhere what Python tells, at the least the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def gpu() -> dict[str, str]:
    """The first NVIDIA GPU's name and driver, as ``GPU`` and ``driver``; neither where its driver tells none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    name, _, driver = found.partition("\n")[0].partition(",")
    return {"GPU": name.strip(), "driver": driver.strip()} if name else {}
