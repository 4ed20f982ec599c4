"""``python -m zilc.models NAME FILE.onnx`` writes a network; without arguments, lists them."""

from __future__ import annotations

import sys

from zilc import onnx_io
from zilc.errors import ZilcError
from zilc.models import build, names


def main(arguments: list[str]) -> int:
    """0, 1 for an error, 2 for usage."""
    if not arguments:
        print("\n".join(names()))
        return 0
    if len(arguments) != 2:
        print("usage: python -m zilc.models NAME FILE.onnx", file=sys.stderr)
        return 2
    try:
        onnx_io.save(build(arguments[0]), arguments[1])
    except ZilcError as error:
        print(f"zilc.models: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
