"""Fetches the library that pages are drawn with from npm, at its pinned version, into zilc/web.

    python tools/vendor_web.py            # write the files
    python tools/vendor_web.py --check    # compare what lies there with the pin, without a network

``zilc/web/vendor.json`` pins the package: its version, npm's integrity of the tarball, and the SHA-256 of every file
taken from it.  The licence lies beside the library.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

WEB = Path(__file__).resolve().parent.parent / "zilc" / "web"


def tarball(name: str, version: str) -> bytes:
    """The package as npm has it.

    Raises:
        OSError, subprocess.CalledProcessError: there is no npm, or it has no such package.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", folder, f"{name}@{version}"],
            check=True, cwd=folder, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return next(Path(folder).glob("*.tgz")).read_bytes()


def integrity(data: bytes) -> str:
    """As npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


def differing(pin: dict, web: Path = WEB) -> list[str]:
    """Files that are missing or not as pinned."""
    return [
        name for name, file in pin["files"].items()
        if not (web / name).is_file() or hashlib.sha256((web / name).read_bytes()).hexdigest() != file["sha256"]
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put the pinned drawing library into zilc/web.")
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args(argv).check
    pin = json.loads((WEB / "vendor.json").read_text("utf-8"))
    if not check:
        data = tarball(pin["name"], pin["version"])
        if integrity(data) != pin["integrity"]:
            print(f"{pin['name']} {pin['version']}: the tarball is not the pinned one", file=sys.stderr)
            return 1
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for name, file in pin["files"].items():
                member = archive.extractfile(file["from"])
                assert member is not None
                (WEB / name).write_bytes(member.read())
    wrong = differing(pin)
    for name in wrong:
        print(f"zilc/web/{name}: not as pinned in vendor.json", file=sys.stderr)
    if not wrong:
        print(f"{pin['name']} {pin['version']} ({pin['license']}): {len(pin['files'])} files as pinned")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
