"""A headless Chromium, driven over its own debugging pipe: no driver, no network.

As a program, `python tests/chromium.py report.html DIRECTORY` writes what a phone and a desk show of a report first.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "DENSE2MOE_BROWSER"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
_LOGGED = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


def find_browser() -> str | None:
    """The browser that the environment variable names, or one on the path."""
    return os.environ.get(VARIABLE) or next((found for name in _NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab. `complaints` is all that its console said: errors, warnings, refused loads, exceptions."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._number, self._rest, self._session = 0, b"", ""
        self.complaints: list[dict[str, Any]] = []
        self._events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the Chrome DevTools Protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | (
            {"sessionId": self._session} if self._session else {}
        )
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read, 1 << 16)
            assert piece, f"the browser ended: {self._process.poll()}"
            self._rest += piece
        text, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(text)
        self._events.append(found.get("method", ""))
        if found.get("method") in _LOGGED:
            self.complaints.append(found["params"])
        return found

    def open(self, path: Path, width: int, height: int, scale: float = 1) -> None:
        """Show a file in a window so wide and high, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._next()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path, **clip: float) -> None:
        """What the window shows, or a part of the page (x, y, width, height), as PNG."""
        region = {"clip": clip | {"scale": 1}, "captureBeyondViewport": True} if clip else {}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **region)["data"]))

    def print(self, path: Path) -> None:
        """The page on paper of its own size, as PDF."""
        path.write_bytes(
            base64.b64decode(
                self.call("Page.printToPDF", preferCSSPageSize=True, paperWidth=8.27, paperHeight=11.69)["data"]
            )
        )


@contextmanager
def open_browser(executable: str, profile: Path) -> Iterator[Page]:
    """A browser with one tab.

    It reads commands from descriptor 3 and answers on 4, each message ended by a zero byte.
    """
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (*os.pipe(), *os.pipe())]
    their_read, our_write, our_read, their_write = ends

    def connect() -> None:
        os.dup2(their_read, 3)
        os.dup2(their_write, 4)

    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-extensions",
    ]
    command = [executable, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    process = subprocess.Popen(
        command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(their_read)
    os.close(their_write)
    try:
        yield Page(process, our_write, our_read)
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(our_write)
        os.close(our_read)


if __name__ == "__main__":
    page_path, pictures = Path(sys.argv[1]), Path(sys.argv[2])
    found = find_browser()
    assert found is not None, f"no Chromium on the path; install one, or name it by {VARIABLE}"
    with tempfile.TemporaryDirectory() as folder, open_browser(found, Path(folder)) as tab:
        for name, width, height in (("phone", 390, 844), ("desktop", 1280, 1000)):
            tab.open(page_path, width, height)
            tab.screenshot(pictures / f"report-{name}.png")
