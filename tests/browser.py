"""A real browser for tests: headless Chromium, spoken to by its own protocol over a pipe, without other packages."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-default-browser-check",
    "--remote-debugging-pipe", "--force-color-profile=srgb",
)  # fmt: skip


def find() -> str | None:
    """The browser's program, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page.

    Attributes:
        requests: Addresses that the page asked for since ``open``, its own and data URIs among them.
        complaints: What the console, the log and the content policy said since ``open``.
    """

    def __init__(self, program: str, folder: Path) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._number, self._rest, self._session = 0, b"", ""
        ours_out, theirs_in = self._pipe()
        theirs_out, ours_in = self._pipe()
        log = (os.POSIX_SPAWN_OPEN, 2, str(folder / "browser.log"), os.O_WRONLY | os.O_CREAT, 0o600)
        actions = [(os.POSIX_SPAWN_DUP2, theirs_out, 3), (os.POSIX_SPAWN_DUP2, theirs_in, 4), log]
        command = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._pid = os.posix_spawn(program, command, os.environ, file_actions=actions, setpgroup=0)
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = ours_out, ours_in
        target = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        found = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = found["sessionId"]
        for part in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{part}.enable")

    @staticmethod
    def _pipe() -> tuple[int, int]:
        """Ends with numbers that a child's 3 and 4 cannot collide with."""
        ends = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends]
        for end in ends:
            os.close(end)
        return high[0], high[1]

    def open(self, file: Path, width: int = 1280, height: int = 800) -> None:
        """Shows a file in a window of this size and waits until it has loaded."""
        self.requests, self.complaints = [], []
        self.size(width, height)
        self._loaded = False
        self._call("Page.navigate", url=file.resolve().as_uri())
        self._until(lambda: self._loaded)
        self.value("Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(() => 1)")

    def size(self, width: int, height: int) -> None:
        """Another size of the window."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **sizes)

    def media(self, kind: str) -> None:
        """Lays the page out for ``"print"`` or ``"screen"``."""
        self._call("Emulation.setEmulatedMedia", media=kind)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, outside of the page's policy."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def click(self, x: float, y: float) -> None:
        """A click of the mouse at a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        """A key of the keyboard, by name and Windows code."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        return base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def pdf(self) -> bytes:
        """The page on A4 paper."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True, "printBackground": True}
        return base64.b64decode(self._call("Page.printToPDF", **paper)["data"])

    def close(self) -> None:
        """Ends the browser and whatever it started."""
        with suppress(OSError, TimeoutError, RuntimeError):
            self._session = ""
            self._call("Browser.close", _seconds=5)
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        os.close(self._in)
        os.close(self._out)

    def _call(self, method: str, *, _seconds: float = 60, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._in, data) :]
        answer: dict[str, Any] = {}

        def answered() -> bool:
            return bool(answer)

        self._until(answered, _seconds, number, answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def _until(self, done: Any, seconds: float = 60, number: int = -1, answer: dict[str, Any] | None = None) -> None:
        end = time.monotonic() + seconds
        while not done():
            if not select.select([self._out], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser did not answer")
            data = os.read(self._out, 1 << 20)
            if not data:
                raise OSError("the browser ended")
            *messages, self._rest = (self._rest + data).split(b"\0")
            for text in messages:
                message = json.loads(text)
                if message.get("id") == number and answer is not None:
                    answer.update(message)
                self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, method: str, found: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(found["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(found)[:500])
