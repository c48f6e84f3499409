"""A real browser without a window, driven by ChromeDriver over the W3C WebDriver protocol, which is JSON over HTTP.

Debian: `apt-get install chromium chromium-driver`. `STEP_CHROMEDRIVER` and `STEP_CHROMIUM` name others.
"""

import http.client
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
_TIMEOUT = 120


def driver() -> str | None:
    """Path of ChromeDriver, None where there is none."""
    return os.environ.get("STEP_CHROMEDRIVER") or shutil.which("chromedriver")


class Browser:
    """One tab. Elements are named by CSS selectors and waited for."""

    def __init__(self, port: int, profile: Path):
        self._port, self._session = port, ""
        options = {"args": [*_ARGUMENTS, f"--user-data-dir={profile}"]}
        if binary := os.environ.get("STEP_CHROMIUM"):
            options["binary"] = binary
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "timeouts": {"implicit": 30_000, "script": 30_000}}
        self._session = f"/session/{self._call('POST', '/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def click(self, selector: str) -> None:
        """As a person does: what is hidden or covered cannot be clicked."""
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        """What is to be read there."""
        return self._call("GET", f"/element/{self._find(selector)}/text")

    def run(self, script: str) -> Any:
        """The value of an asynchronous script, which gives it to `done`."""
        script = f"const done = arguments[arguments.length - 1];\n{script}"
        return self._call("POST", "/execute/async", {"script": script, "args": []})

    def wait(self, condition: str) -> None:
        """Until an expression holds."""
        self.run(f"const poll = () => ({condition}) ? done() : setTimeout(poll, 20);\npoll();")

    def close(self) -> None:
        self._call("DELETE", "")

    def _find(self, selector: str) -> str:
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_TIMEOUT)
        try:
            connection.request(method, self._session + path, None if body is None else json.dumps(body))
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{value['error']}: {value['message'].splitlines()[0]}")
        return value


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that has never been used; `folder` holds its profile."""
    command = [driver(), "--port=0", "--allowed-ips=127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            started = next(line for line in process.stdout if "on port" in line and "success" in line)
            tab = Browser(int(re.search(r"on port (\d+)", started)[1]), folder / "profile")
            try:
                yield tab
            finally:
                tab.close()
        finally:
            process.terminate()
