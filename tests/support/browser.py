"""A headless Chromium driven over a pipe with the DevTools protocol; no driver, no websocket, no network."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# DOM key names, their key codes and the text they type; anything else is a character of its own
KEYS = {
    "Tab": 9, "Enter": 13, "Escape": 27, "PageUp": 33, "PageDown": 34, "ArrowLeft": 37, "ArrowUp": 38,
    "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip


class Browser:
    """One page of a headless Chromium; a context manager."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900) -> None:
        assert PROGRAM, "no chromium"
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def connect() -> None:
            # the protocol runs over descriptors 3 and 4; by way of copies, since these may be taken
            high = [os.dup2(fd, 100 + k) for k, fd in enumerate((to_browser, from_browser))]
            for fd, target in zip(high, (3, 4), strict=True):
                os.dup2(fd, target)

        self._process = subprocess.Popen(
            [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
            + ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
            + [f"--window-size={width},{height}", f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._buffer, self.events = 0, b"", list[dict[str, Any]]()
        self._size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.tab = self.new_tab()

    def new_tab(self) -> str:
        """Open a tab and go on in it; assign an earlier one to `tab` and call `front` to go back."""
        target = self._call("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)
        self.tab = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", self._size)
        self.call("Emulation.setFocusEmulationEnabled", {"enabled": True})
        return self.tab

    def kill(self) -> None:
        """End the browser without a chance to save anything."""
        self._process.kill()
        self._process.wait(timeout=30)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._call(method, parameters or {}, self.tab)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        options = {"expression": script, "returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", options)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", {"url": url})

    def until(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true and return it."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"still not true: {script}"
            time.sleep(0.05)
        return value

    def press(self, *keys: str, shift: bool = False) -> None:
        for key in keys:
            text = "" if key in KEYS and key != "Enter" else {"Enter": "\r"}.get(key, key)
            code = KEYS.get(key) or ord(key.upper())
            event = {"key": key, "windowsVirtualKeyCode": code, "text": text, "modifiers": 8 if shift else 0}
            self.call("Input.dispatchKeyEvent", {"type": "keyDown" if text else "rawKeyDown", **event})
            self.call("Input.dispatchKeyEvent", {"type": "keyUp", **event})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, parameters: dict[str, Any], session: str | None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _receive(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], seconds)
            assert ready, "chromium does not answer"
            part = os.read(self._read, 1 << 16)
            assert part, "chromium has gone"
            self._buffer += part
        text, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(text)
