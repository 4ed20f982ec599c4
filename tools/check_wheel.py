"""Builds zilc's wheel and says what of the sources is not in it.

    python tools/check_wheel.py

Packages are listed by hand in pyproject.toml, and two of them lie in folders of other names: a folder that
the list forgets would vanish without a word.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Source folder -> where its files lie in the wheel.
FOLDERS = {"zilc": "zilc", "passes": "zilc/passes", "models": "zilc/models"}
#: What the package needs beside its modules.
DATA = (
    "zilc/py.typed", "zilc/signature.schema.json", "zilc/certificate.schema.json", "zilc/certificate.html.jinja",
)  # fmt: skip
#: Not part of a build, and stale copies in build/ would hide a package that the list forgot.
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "demo", "out", "docs", "tests", "node_modules"
)


def expected(root: Path) -> set[str]:
    """Every file that the wheel must hold, read off the source folders."""
    wanted = set(DATA)
    wanted.update(f"zilc/web/{path.name}" for path in (root / "zilc" / "web").iterdir())
    for folder, package in FOLDERS.items():
        for path in (root / folder).rglob("*.py"):
            if "__pycache__" not in path.parts:
                wanted.add(f"{package}/{path.relative_to(root / folder).as_posix()}")
    return wanted


def build_wheel(root: Path, folder: Path) -> Path:
    """The wheel of a clean copy of the sources, made in ``folder``.

    Raises:
        subprocess.CalledProcessError: the build fails; its output is in ``stderr``.
    """
    copy, made = folder / "source", folder / "wheel"
    shutil.copytree(root, copy, ignore=LEFT_OUT)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(made), str(copy)]
    if setuptools_at_hand():
        command.insert(4, "--no-build-isolation")  # else pip fetches it
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(made.glob("*.whl"))


def setuptools_at_hand() -> bool:
    """Whether the setuptools that pyproject.toml asks for is installed."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


def missing(wheel: Path, wanted: set[str]) -> list[str]:
    """What of ``wanted`` is not in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(wanted - set(archive.namelist()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the wheel and list what of the sources is not in it.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    root = parser.parse_args(argv).root.resolve()
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel = build_wheel(root, Path(folder))
        except subprocess.CalledProcessError as error:
            print(f"{error.stdout}{error.stderr}", file=sys.stderr)
            print("the wheel does not build", file=sys.stderr)
            return 1
        wanted = expected(root)
        gone = missing(wheel, wanted)
        for name in gone:
            print(f"missing from {wheel.name}: {name}")
        if not gone:
            print(f"{wheel.name}: all {len(wanted)} files are in it")
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
