"""A headless Chromium that is asked over its DevTools how a page looks on a phone or a desk, in light and in dark.

Look yourself: python -m tests.evidence.browser PAGE.html OUT (writes four screenshots)
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
SIZES = {"phone": (390, 844), "desk": (1280, 900)}
SCHEMES = ("light", "dark")


@dataclass(frozen=True)
class Look:
    """How a page came out.

    Attributes:
        requests: addresses that the page asked for, itself among them.
        errors: what the console said.
        width, inner_width: of the document's content, and of the window.
        values: answers to the scripts, in their order.
        picture: PNG of the whole page, or of its top.
    """

    requests: list[str]
    errors: list[str]
    width: int
    inner_width: int
    values: list[Any]
    picture: bytes


@contextmanager
def browser() -> Iterator[str]:
    """A running Chromium's DevTools address."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port, deadline = Path(profile) / "DevToolsActivePort", time.monotonic() + 60
            while not (port.exists() and port.read_text().count("\n")):
                assert time.monotonic() < deadline, "Chromium did not start within 60 s"
                assert process.poll() is None, f"Chromium ended with {process.returncode}"
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port.read_text().split()[0]}"
        finally:
            process.terminate()
            process.wait(30)


def look(devtools: str, page: Path, size: str, scheme: str, scripts: tuple[str, ...] = (), whole: bool = False) -> Look:
    """Open a file as it would look at one of `SIZES` in one of `SCHEMES`."""
    return asyncio.run(_look(devtools, page.resolve().as_uri(), *SIZES[size], scheme, scripts, whole))


async def _look(devtools: str, url: str, width: int, height: int, scheme: str, scripts: tuple[str, ...], whole: bool) -> Look:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{devtools}/json/new?about:blank") as answer:
            target = await answer.json(content_type=None)
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            events: list[dict[str, Any]] = []
            ids = itertools.count(1)

            async def call(method: str, **params: Any) -> Any:
                number = next(ids)
                await socket.send_json({"id": number, "method": method, "params": params})
                while (message := await socket.receive_json(timeout=60)).get("id") != number:
                    events.append(message)
                assert "error" not in message, message
                return message["result"]

            for domain in ("Page", "Network", "Runtime", "Log"):
                await call(f"{domain}.enable")
            await call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
            await call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            await call("Page.navigate", url=url)
            while not any(event["method"] == "Page.loadEventFired" for event in events):
                events.append(await socket.receive_json(timeout=60))

            async def value(script: str) -> Any:
                return (await call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True))["result"].get("value")

            values = [await value(script) for script in scripts]
            widths = await value("[document.documentElement.scrollWidth, window.innerWidth]")
            shot = await call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **await _clip(value, width, whole))
            requests = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
            errors = [str(event["params"]) for event in events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
        async with session.get(f"{devtools}/json/close/{target['id']}"):
            pass
    return Look(requests, errors, *widths, values, base64.b64decode(shot["data"]))


async def _clip(value: Any, width: int, whole: bool) -> dict[str, Any]:
    if not whole:
        return {}
    height = await value("document.documentElement.scrollHeight")
    return {"clip": {"x": 0, "y": 0, "width": width, "height": min(height, 16_000), "scale": 1}}


if __name__ == "__main__":
    with browser() as address:
        for size, scheme in itertools.product(SIZES, SCHEMES):
            found = look(address, Path(sys.argv[1]), size, scheme, whole=True)
            Path(sys.argv[2], f"{Path(sys.argv[1]).stem}-{size}-{scheme}.png").write_bytes(found.picture)
            print(size, scheme, found.width, found.inner_width, [url[:60] for url in found.requests], found.errors)
