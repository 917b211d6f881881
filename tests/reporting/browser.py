"""A headless Chromium driven through its own DevTools protocol, with aiohttp, which `datasets` brings along."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_S = 300  # with a busy machine
# What a page must not do: fail, complain, or be refused something.
COMPLAINTS = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Network.loadingFailed"}


class Tab:
    """One page. `events`: everything the browser said since it was opened."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.events, self.sent = socket, list[dict[str, Any]](), 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command."""
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=PATIENCE_S)
            if message.get("id") == self.sent:
                assert "error" not in message, message
                return dict(message["result"])
            self.events.append(message)

    async def open(self, file: Path, width: int = 1280, height: int = 900) -> None:
        """Load a page and wait for its load event."""
        for domain in ("Runtime", "Log", "Network", "Page"):
            await self.call(f"{domain}.enable")
        await self.call("Performance.enable", timeDomain="threadTicks")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        await self.call("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(await self.socket.receive_json(timeout=PATIENCE_S))
        await self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    async def value(self, expression: str) -> Any:
        """What an expression gives in the page."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression is true in the page."""
        deadline = time.monotonic() + PATIENCE_S
        while not await self.value(expression):
            assert time.monotonic() < deadline, expression
            await asyncio.sleep(0.02)

    async def point_at(self, selector: str) -> None:
        """Move the mouse to the middle of an element, scrolled into view."""
        await self.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = await self.value(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for shift in (3, 0):  # a mouse comes from somewhere
            await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + shift, y=box[1])

    async def cpu_seconds(self) -> float:
        """Processor time of the page's main thread so far, which a busy machine does not stretch."""
        found = await self.call("Performance.getMetrics")
        return float({entry["name"]: entry["value"] for entry in found["metrics"]}["TaskDuration"])

    @property
    def complaints(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["method"] in COMPLAINTS]

    @property
    def requested(self) -> list[str]:
        """Every address the page asked for; data inside the page is none."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent if not params["request"]["url"].startswith("data:")]


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def browser_command(browser: str, profile: Path) -> list[str]:
    """The command of a headless browser that makes no requests of its own."""
    command = [browser, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
    # The sandbox refuses to run as root, as in most containers; the page is our own and loads nothing.
    return [*command, "--no-sandbox"] if os.geteuid() == 0 else command


def in_browser(work: Path, visit: Callable[[Tab], Awaitable[None]]) -> None:
    """Start a browser with its profile in `work`, give a fresh tab to `visit`, and end the browser."""
    profile = work / "profile"
    process = subprocess.Popen(
        [*browser_command(str(find_browser()), profile), "--remote-debugging-port=0", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        asyncio.run(_visited(profile / "DevToolsActivePort", visit))
    finally:
        process.terminate()
        process.wait()


async def _visited(port_file: Path, visit: Callable[[Tab], Awaitable[None]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not (port_file.is_file() and port_file.read_text().count("\n")):
        assert time.monotonic() < deadline, "the browser did not start"
        await asyncio.sleep(0.1)
    address = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}/json/list"
    async with aiohttp.ClientSession() as session:
        async with session.get(address) as answer:
            tab = next(entry for entry in await answer.json() if entry["type"] == "page")
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            await visit(Tab(socket))
