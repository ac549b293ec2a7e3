"""A real browser without a window, for tests of the status page: Chromium, spoken to by its DevTools protocol.

Debian's ``chromium-headless-shell`` or ``chromium``; where there is none, a test that asks for it is skipped.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
MISSING = "there is no Chromium here (Debian: apt-get install chromium-headless-shell)"


def find() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        #: What the page has complained of: exceptions, and what its policy did not let it do.
        self.complaints: list[str] = []
        #: Addresses that it has asked for.
        self.requests: list[str] = []

    async def call(self, method: str, **parameters: Any) -> Any:
        """A command of the protocol, and its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._hear(message)

    def _hear(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.complaints.append(str(told["entry"]["text"]))
        elif event["method"] == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    async def open(self, address: str, *, width: int = 1000, height: int = 900, dark: bool = False) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url=address)

    async def read(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, *, seconds: float = 60.0) -> Any:
        """Wait until an expression is true."""
        try:
            async with asyncio.timeout(seconds):
                while not (value := await self.read(script)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"never true: {script}\n{await self.read('document.body.innerText')}") from None
        return value

    async def press(self, key: str) -> None:
        extra = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, **(extra if kind == "keyDown" else {})
            )

    async def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def screenshot(self) -> bytes:
        """The whole page, however long, as PNG."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])


@asynccontextmanager
async def browsing(program: str, folder: Path) -> AsyncIterator[Page]:
    """A browser with one empty tab during the block. ``folder`` is for what it leaves behind."""
    words = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-port=0"]
    if os.geteuid() == 0:
        words.append("--no-sandbox")  # it refuses root otherwise; what it opens here is our own page
    with (folder / "browser.log").open("wb") as log:
        browser = await asyncio.create_subprocess_exec(
            program,
            *words,
            f"--user-data-dir={folder}",
            "about:blank",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        port = await _port(folder / "DevToolsActivePort", browser)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (tab,) = [tab for tab in await answer.json() if tab["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        os.killpg(browser.pid, signal.SIGKILL)  # Debian's command is a script around the program
        await browser.wait()


async def _port(told: Path, browser: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(60):
        while (port := await asyncio.to_thread(_read, told)) is None:
            assert browser.returncode is None, "the browser ended"
            await asyncio.sleep(0.02)
    return port


def _read(told: Path) -> int | None:
    """The port in the file that the browser writes, once it has."""
    text = told.read_text("utf-8") if told.exists() else ""
    return int(text.splitlines()[0]) if "\n" in text else None
