"""Says where a Chromium or Chrome is, for the tests that look at pages; installs Debian's where that is possible.

    python tools/find_browser.py

Looks at $ZILC_BROWSER, then on PATH.  As root on a machine with apt it installs the package ``chromium``; anywhere
else it says what to install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome", "microsoft-edge")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


def browser() -> str | None:
    """Path of a browser that is there."""
    chosen = os.environ.get("ZILC_BROWSER")
    if chosen:
        return shutil.which(chosen)
    return next(filter(None, map(shutil.which, (*NAMES, MAC))), None)


def install() -> None:
    """Debian's package; its dependencies are what a headless page needs."""
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-qy", "--no-install-recommends", "chromium"]):
        subprocess.run(command, stdout=sys.stderr, check=False, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def main() -> int:
    found = browser()
    if found is None and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        install()
        found = browser()
    if found is None:
        print(
            "no Chromium or Chrome found, which the tests of pages need: install one (Debian: apt-get install "
            "chromium; Ubuntu: snap install chromium; macOS: brew install --cask google-chrome), or name it in "
            "$ZILC_BROWSER",
            file=sys.stderr,
        )
        return 1
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
