"""Verify nine published image networks parameter by parameter, and write what was found into docs/ZOO.md.

    python tools/verify_zoo.py [NETWORK ...] [--directions 3] [--precision float64] [--stride 1] [-o docs/ZOO.md]

A network takes 2 * directions * parameters forward passes in float64, minutes for most and hours for the largest.
Rows of networks that are not named stay as the page has them.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import zilc  # noqa: E402
from tests import zoo  # noqa: E402

COLUMNS = (
    "network", "K", "vertices", "identities: edge", "shared", "parameters", "checked", "directions", "bits equal",
    "max error", "executor: training", "differences", "seconds", "on",
)  # fmt: skip
HEAD = """# Nine networks, verified

The image networks that ship with onnx (`onnx/backend/test/data/light`), with random weights of He's variance, one
image of 3 x 224 x 224, cross-entropy on the logits. For each trained parameter: the gradient by Z-IL against the one
by backpropagation, bit by bit, and against central differences of the original file in float64, along random
directions. *max error* is the largest difference over the parameters, relative to |gradient| |direction| / sqrt(size).
A Relu or a MaxPool that switches within a step leaves an error of the differences, not of the gradient.

Made by `python tools/verify_zoo.py`; *checked* is less than *parameters* where only every n-th was taken.

"""


def main() -> int:
    """Verify, print and write.  1 if a network fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(zoo.NAMES)}")
    parser.add_argument("--directions", type=int, default=3, help="random directions a parameter")
    parser.add_argument("--precision", choices=("float32", "float64"), default="float64", help="of the training graph")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th parameter")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "ZOO.md")
    given = parser.parse_args()
    unknown = set(given.networks) - set(zoo.NAMES)
    if unknown:
        parser.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(zoo.NAMES)}")
    rows = read(given.output)
    passed = True
    for name in given.networks or zoo.NAMES:
        row, right = verify(name, given.directions, given.precision, given.stride)
        passed &= right
        rows[name] = row
        print(" | ".join(row), flush=True)
        write(given.output, rows)
    return 0 if passed else 1


def verify(name: str, directions: int, precision: Any, stride: int) -> tuple[list[str], bool]:
    """The row of one network, and whether it passed."""
    model, _ = zoo.network(name)
    options: dict[str, Any] = {"output": zoo.logits(model)}
    report = zilc.levelize(model, identities="none", **options).report
    parameters = [leaf["name"] for leaf in report["leaves"] if leaf["trained"]]
    chosen = parameters[::stride]
    start = time.perf_counter()
    found = zilc.verify(
        model, loss="cross-entropy", class_axis=1, precision=precision, directions=directions, wrt=chosen,
        inputs=zoo.image(model), progress=_progress(name), **options,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    print(file=sys.stderr)
    row = [
        name, str(report["levels"]), str(report["vertices"]),
        *(str(report["identities"][kind]["vertices"]) for kind in ("edge", "shared")),
        str(len(parameters)), str(len(found.data["parameters"])), str(directions),
        "yes" if found.data["zil_equals_bp"] else "no", f"{found.data['max_error']:.1e}",
        f"{precision}, {found.data['executor']['training']}", found.data["executor"]["differences"], f"{seconds:.0f}",
        machine(),
    ]  # fmt: skip
    return row, found.passed


def _progress(name: str) -> Any:
    def show(done: int, total: int) -> None:
        print(f"\r{name}: {done} of {total} forward passes", end="", file=sys.stderr, flush=True)

    return show


def machine() -> str:
    """Processor and versions."""
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("zilc", "onnx", "numpy"))
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, {versions}"


def read(page: Path) -> dict[str, list[str]]:
    """Rows that the page has, by network."""
    if not page.exists():
        return {}
    lines = [line for line in page.read_text("utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in cells if row[0] in zoo.NAMES and len(row) == len(COLUMNS)}


def write(page: Path, rows: dict[str, list[str]]) -> None:
    """The whole page anew, rows in the order of the networks."""
    table = [COLUMNS, ["---"] * len(COLUMNS), *(rows[name] for name in zoo.NAMES if name in rows)]
    page.parent.mkdir(exist_ok=True)
    page.write_text(HEAD + "".join(f"| {' | '.join(row)} |\n" for row in table), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
