"""A headless Chromium driven by its DevTools protocol: enough to click through a page and take its picture."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    """The browser's program, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """`async with Browser(find()) as browser: await browser.open(url)`."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._number = 0

    async def __aenter__(self) -> Browser:
        self._folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        command = [self._program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                   "--remote-debugging-port=0", f"--user-data-dir={self._folder.name}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._session = aiohttp.ClientSession()
        try:
            port = await self._port(Path(self._folder.name) / "DevToolsActivePort")
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                target = next(entry for entry in await reply.json() if entry["type"] == "page")
            self._socket = await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._session.close()
        self._process.terminate()
        self._process.wait(20)
        self._folder.cleanup()

    async def _port(self, file: Path, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.poll() is None:
            if file.exists() and (lines := file.read_text().split()):
                return int(lines[0])
            await asyncio.sleep(0.1)
        raise TimeoutError(f"{self._program} gave no port for its DevTools within {seconds:.0f} s")

    async def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while (answer := json.loads(await self._socket.receive_str(timeout=60))).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str, width: int = 800, height: int = 900, dark: bool = False) -> None:
        """Load `url` in a window of this size in CSS pixels, light or dark."""
        await self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        await self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        await self._call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def value(self, script: str) -> Any:
        """The value of a JavaScript expression; RuntimeError where it throws."""
        answer = await self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, script: str, seconds: float = 20) -> None:
        """Wait until the expression is true. Raises TimeoutError with the page's text."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if await self.value(script):
                return
            await asyncio.sleep(0.1)
        raise TimeoutError(f"{script} is not true after {seconds:.0f} s:\n{await self.value('document.body.innerText')}")

    async def choose(self, selector: str, value: str) -> None:
        """Choose an entry of a <select> as a user does."""
        await self.value(f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('change')); }})"
                         f"(document.querySelector({json.dumps(selector)}))")

    async def click(self, selector: str) -> None:
        """Click on an element."""
        await self.value(f"document.querySelector({json.dumps(selector)}).click()")

    async def picture(self) -> bytes:
        """The whole page as PNG."""
        size = (await self._call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        return base64.b64decode((await self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip))["data"])
