"""A real browser for tests: the system's Chromium, headless, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

OpenPage = Callable[[str, int], "OpenedPage"]


class OpenedPage:
    """A loaded page: what it complained about, what it asked for, and the values of scripts in it.

    Attributes:
        errors: Exceptions, and errors and warnings on its console.
        requests: Addresses that it asked for, without its own; inlined data too.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.errors: list[str] = []
        requests: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console",
            lambda message: (
                self.errors.append(message.text)
                if message.type in ("error", "warning", "assert")
                else None
            ),
        )
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_timeout(200)  # milliseconds, for scripts that run after loading
        self.requests = [url for url in requests if url != address]
        self.page = page

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression, awaited."""
        return self.page.evaluate(expression)

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        root = "document.documentElement"
        return int(self.evaluate(f"{root}.scrollWidth - {root}.clientWidth"))


@contextmanager
def chromium() -> Iterator[OpenPage]:
    """A running browser, as a function that opens an address in a fresh window of a width.

    Windows below 600 pixels are a telephone's.
    """
    with sync_playwright() as playwright:
        browser: Browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )

        def open_page(address: str, width: int) -> OpenedPage:
            window = browser.new_context(
                viewport={"width": width, "height": 900}, is_mobile=width < 600
            )
            return OpenedPage(window.new_page(), address)

        yield open_page
        browser.close()
