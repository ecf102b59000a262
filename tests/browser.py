"""A real browser without a window: Debian's chromium, spoken to in its DevTools protocol over a pipe.

Nothing is installed for it from Python: `apt-get install chromium` is enough, and without it the tests are skipped.
"""

import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
LONGEST = 30.0  # seconds that an answer may take


def need_browser() -> str:
    """The browser's path; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no browser: apt-get install chromium")
    return found


class Browser:
    """One tab. Use as a context manager.

    Attributes:
        errors: what pages have said on their consoles, warnings and errors, and exceptions that nobody caught.
        asked: addresses that pages have asked for, other than files and data.
    """

    def __init__(self, width: int = 1200, height: int = 900, language: str = "en"):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        self._answers = selectors.DefaultSelector()  # and not select(), whose descriptors are below 1024
        self._answers.register(self._read, selectors.EVENT_READ)
        flags = " ".join([*QUIET, f"--user-data-dir={self._folder.name}", f"--lang={language}"])
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {need_browser()} {flags} about:blank 3<&{commands} 4>&{answers}"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"LANGUAGE": language},
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, None
        self.errors: list[str] = []
        self.asked: list[str] = []
        page = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        self._answers.close()
        os.close(self._read)
        self._folder.cleanup()

    def open(self, page: Path) -> None:
        """Load a file and wait for it."""
        self._call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + LONGEST
        while self.run("document.readyState + location.href") != f"complete{page.resolve().as_uri()}":
            assert time.monotonic() < deadline, f"{page} was not loaded"
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, a promise's when it is there."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"].get("exception", answer)
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key, by its name."""
        code = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
        more = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def resize(self, width: int, height: int) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def prefer(self, scheme: str, media: str = "") -> None:
        """A device in "light" or "dark"; with `media` "print" as it is printed."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", media=media, features=features)

    def picture(self) -> str:
        """The page as it is seen, in full: a PNG, in base 64."""
        return self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(parameters["exceptionDetails"].get("exception", parameters)))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.errors.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.errors.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                self.asked += [] if url.startswith(("file:", "data:", "about:")) else [url]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + LONGEST
        while b"\0" not in self._buffer:
            ready = self._answers.select(max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._read, 2**16)
            assert part, "the browser has ended"
            self._buffer += part
        first, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(first)
