"""A real browser for tests: headless Chromium over its debugging pipe, without any library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files --remote-debugging-pipe"
)
SECONDS = 60.0


def installed() -> bool:
    """Whether there is a Chromium on the PATH."""
    return shutil.which("chromium") is not None


@dataclass
class Page:
    """An open page: what it complained about, what it asked for, and what a script in it says.

    Attributes:
        errors: Exceptions, console errors and warnings, and what the browser logged about the page.
        requests: Addresses that it asked for, itself left out; inlined data too.
    """

    errors: list[str]
    requests: list[str]
    call: Callable[..., Any]

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression, awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(
            self.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
        )

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))


class Browser:
    """One Chromium; `open` gives it a new page."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._count, self._buffer, self.events = 0, b"", list[dict[str, Any]]()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and wait for its answer; events on the way are
        kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._until(lambda m: m.get("id") == self._count)["result"]

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if b"\0" not in self._buffer:
                if select.select([self._read], [], [], 1.0)[0]:
                    piece = os.read(self._read, 1 << 16)
                    if not piece:
                        raise ConnectionError("Chromium has closed its pipe")
                    self._buffer += piece
                continue
            line, _, self._buffer = self._buffer.partition(b"\0")
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise AssertionError(message["error"])
            if "method" in message:
                self.events.append(message)
            if wanted(message):
                return message
        raise TimeoutError(f"no answer of Chromium in {SECONDS:g} s")

    def open(self, address: str, width: int, height: int = 900) -> Page:
        """Load a page in a window of this width, and wait until nothing more is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def call(method: str, **params: Any) -> dict[str, Any]:
            return self.call(method, session, **params)

        for domain in ("Page", "Runtime", "Log", "Network"):
            call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        if failure := call("Page.navigate", url=address).get("errorText"):
            raise AssertionError(f"{address}: {failure}")
        self._until(
            lambda m: m.get("method") == "Page.loadEventFired" and m.get("sessionId") == session
        )
        page = Page([], [], call)
        page.evaluate(
            "new Promise(done => setTimeout(done, 200))"
        )  # scripts that run after loading
        for event in self.events:
            self._note(page, event["method"], event.get("params", {}), address)
        return page

    @staticmethod
    def _note(page: Page, kind: str, params: dict[str, Any], address: str) -> None:
        if kind == "Network.requestWillBeSent" and params["request"]["url"] != address:
            page.requests.append(params["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            page.errors.append(str(params["exceptionDetails"]))
        elif kind == "Runtime.consoleAPICalled" and params["type"] in (
            "error",
            "warning",
            "assert",
        ):
            page.errors.append(str(params["args"]))
        elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            page.errors.append(params["entry"]["text"])


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A running browser with an empty profile; commands go in by descriptor 3 and answers come out
    by 4."""
    theirs_in, write = os.pipe()
    read, theirs_out = os.pipe()
    command = f'exec chromium {FLAGS} --user-data-dir="$0" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", command, str(profile)],
        pass_fds=(theirs_in, theirs_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        browser = Browser(write, read)
        yield browser
        browser.call("Browser.close")
    finally:
        process.kill()
        process.wait()
        os.close(write)
        os.close(read)
