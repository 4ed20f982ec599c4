"""A real browser without a network, for the tests of pages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from tools.find_browser import browser as find


@dataclass
class Opened:
    """A page and what it did.

    Attributes:
        requests: everything it asked for.
        complaints: errors, and whatever it wrote on the console.
    """

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def fact(self, name: str) -> int:
        return int(self.page.inner_text(f'#facts dd[data-fact="{name}"]').replace(",", ""))

    @property
    def milliseconds(self) -> int:
        """What the page's own script took to draw."""
        return int(self.page.get_attribute("html", "data-ready") or -1)


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """Chromium with a new profile and no network.

    Raises:
        AssertionError: none is installed; `make browser` sees to it.
    """
    path = find()
    assert path is not None, "no Chromium or Chrome: run `make browser`, which installs one or says what to install"
    made: Playwright
    with sync_playwright() as made:
        browser = made.chromium.launch(
            executable_path=path, headless=True,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                  "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"],
        )  # fmt: skip
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Browser, path: Path, *, dark: bool = False) -> Iterator[Opened]:
    """A file as a page, when it has drawn itself."""
    context = browser.new_context(
        viewport={"width": 1440, "height": 1000}, color_scheme="dark" if dark else "light", offline=True,
        reduced_motion="reduce",
    )  # fmt: skip
    made = Opened(context.new_page())
    made.page.on("request", lambda request: made.requests.append(request.url))
    made.page.on("console", lambda message: made.complaints.append(message.text))
    made.page.on("pageerror", lambda error: made.complaints.append(str(error)))
    made.page.goto(path.absolute().as_uri())
    made.page.wait_for_selector("html[data-ready]", timeout=15_000, state="attached")
    try:
        yield made
    finally:
        context.close()
