"""One connection pool to a server, and passes sent through it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp

from softprune.bench.errors import BenchmarkError, HttpStatusError, LengthError, ServerGoneError, ServerReportedError, StallError, gone
from softprune.bench.figures import Repeat, Stream
from softprune.bench.prompts import (
    PATHS,
    Api,
    Counts,
    ReportedError,
    Workload,
    counts_of_answer,
    counts_of_event,
    pathless,
    sglang_flags,
)
from softprune.control import KEY_HEADER, PREFIX, bearer
from softprune.errors import InputError, shortened
from softprune.server_client import is_loopback, known_key

_WATCHED_S = 0.01
"""How often a pass looks whether this process runs when it wants to."""


class DecodeClient:
    """Sends passes to one server; an async context manager.

    Args:
        url: the server, e.g. http://127.0.0.1:30000.
        workload: what to send.
        api: "sglang" (POST /generate), "openai" (POST /v1/completions), or "auto": SGLang's own for SGLang, else OpenAI's.
        stream: False asks for whole answers, which costs servers less and gives throughput only.
        key: softprune's key; else as `softprune.server_client.known_key` finds it.
        engine_key: what the engine itself asks for (its --api-key).
        stall_seconds: longest silence of a connection; without streaming, the longest answer.

    Attributes, once entered:
        url: the server.
        api: the API in use.
        engine: {"name", "version"}, values None if unknown.
        model: its name or path's last component.
        flags: what the server says of its settings and may change a figure.

    Entering raises BenchmarkError.
    """

    def __init__(
        self, url: str, workload: Workload, api: Api | Literal["auto"] = "auto", stream: bool = True, *, key: str | None = None,
        engine_key: str | None = None, stall_seconds: float = 60.0,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("--url", "", shortened(url), "http://HOST:PORT")
        self.url, self.workload, self.stream, self._stall = url.rstrip("/"), workload, stream, stall_seconds
        self.loopback = is_loopback(parts.hostname)
        self._key = key or known_key(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", **bearer(engine_key)}
        self._asked_api = api
        self.api: Api = "openai"
        self.engine: dict[str, str | None] = {"name": None, "version": None}
        self.model: str | None = None
        self.flags: dict[str, Any] = {}
        self._model_name: str | None = None
        self._epoch: int | None = None

    async def __aenter__(self) -> DecodeClient:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._stall, sock_read=self._stall)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=timeout, headers=self._headers, read_bufsize=1 << 20
        )
        try:
            await self._look()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def run_batch(self, batch: int, repeat: int) -> Repeat:
        """One pass.

        Raises:
            BenchmarkError: its subclass says what went wrong, its fields where. The other streams are given up.
        """
        work, place = self.workload, (batch, repeat)
        bodies = [work.body(self.api, self._model_name, self.stream, work.prompt(batch, repeat, index)) for index in range(batch)]
        await asyncio.gather(*(self._get("/v1/models", place=place) for _ in bodies))  # opens one connection each
        cpu, start = time.process_time(), time.perf_counter()
        lateness = _Lateness()
        watch = asyncio.create_task(lateness.watch())
        tasks = [asyncio.create_task(self._request(batch, repeat, index, body, start)) for index, body in enumerate(bodies)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            failed = [task for task in tasks if task.done() and task.exception()]
            streams = tuple([await task for task in failed or tasks])
        finally:
            for task in (watch, *tasks):
                task.cancel()
            await asyncio.gather(watch, *tasks, return_exceptions=True)
        share = (time.process_time() - cpu) / (time.perf_counter() - start)
        return Repeat(batch, repeat, streams, share, lateness.worst)

    async def _request(self, batch: int, repeat: int, index: int, body: bytes, start: float) -> Stream:
        place = (batch, repeat, index)
        arrivals: list[tuple[float, int]] = []
        sent = time.perf_counter()
        try:
            async with self._session.post(self.url + PATHS[self.api], data=body) as response:
                if response.status != 200:
                    text = shortened(pathless((await response.text(errors="replace"))[:500]))
                    raise HttpStatusError(*place, f"HTTP {response.status} with body {text}", "HTTP 200")
                if self.stream:
                    counts, arrivals = await self._read(response.content, place)
                else:
                    counts = counts_of_answer(self.api, await response.read())
                ended = time.perf_counter()
        except ReportedError as error:
            raise ServerReportedError(*place, f"the server's error {shortened(pathless(str(error)[:500]))}", "an answer") from None
        except aiohttp.ServerTimeoutError:
            raise StallError(*place, f"no bytes for {self._stall:g} s", "some, or a larger --stall-seconds") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ServerGoneError(*place, gone(error), f"{self.workload.max_new_tokens} tokens and an end mark") from None
        asked = self.workload
        for what, found, expected in (
            ("generated", counts.generated, asked.max_new_tokens), ("prompt", counts.prompt, asked.prompt_tokens),
        ):  # fmt: skip
            if found != expected:
                raise LengthError(*place, f"{found} {what} tokens (finish reason {counts.finish})", str(expected))
        times = tuple((at - start, tokens) for at, tokens in arrivals)
        return Stream(index, asked.prompt_tokens, counts.cached, counts.generated, sent - start, ended - start, times)

    async def _read(self, content: aiohttp.StreamReader, place: tuple[int, int, int]) -> tuple[Counts, list[tuple[float, int]]]:
        """Follow server-sent events to their end mark: the last full counts, and when the tokens came."""
        counts, rest, had, done = Counts(0), b"", 0, False
        arrivals: list[tuple[float, int]] = []
        async for data in content.iter_any():
            now = time.perf_counter()
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if event == b"data: [DONE]":
                    done = True
                elif event.startswith(b"data: "):
                    counts = counts.then(counts_of_event(self.api, event[6:]))
            if counts.generated > had:
                had = counts.generated
                arrivals.append((now, had))
        if not done:
            raise ServerGoneError(*place, f"the end of the stream after {had} tokens", "an end mark (data: [DONE])")
        return counts, arrivals

    async def _look(self) -> None:
        """Find out which engine this is, and what it says of itself."""
        status, about = await self._get("/version")
        if status == 200 and isinstance(about, dict) and "version" in about:
            self.engine = {"name": "vLLM", "version": str(about["version"])}
        else:
            for path in ("/server_info", "/get_server_info"):
                status, about = await self._get(path)
                if status == 200 and isinstance(about, dict) and "version" in about:
                    self._take_sglang(about)
                    break
        if self._asked_api != "auto":
            self.api = self._asked_api
        elif self.engine["name"] is None:
            found = "no version at vLLM's /version or SGLang's /server_info"
            raise BenchmarkError(None, None, None, found, "one of these servers, or --api sglang or openai")
        _, models = await self._get("/v1/models")
        if isinstance(models, dict) and models.get("data"):
            model = models["data"][0]
            self._model_name = str(model.get("id"))
            self.model = self.model or pathless(str(model.get("root") or model.get("id")))
            if model.get("max_model_len") is not None:
                self.flags["max_model_len"] = model["max_model_len"]

    def _take_sglang(self, about: dict[str, Any]) -> None:
        self.engine = {"name": "SGLang", "version": str(about["version"])}
        self.api = "sglang"
        self.model = pathless(about.get("model_path"))
        self.flags = sglang_flags(about)

    async def softprune_status(self) -> dict[str, Any] | None:
        """softprune's own view of what is served, or None if it is not there or does not know the key."""
        status, body = await self._get(f"{PREFIX}/status", {KEY_HEADER: self._key} if self._key else None)
        if status != 200 or not isinstance(body, dict):
            return None
        if self._epoch is None:
            self._epoch = body.get("mask_epoch")
        return body

    async def check_epoch(self, batch: int | None = None, repeat: int | None = None) -> None:
        """See that the server's mask has not been switched since softprune first told what is served.

        Raises:
            BenchmarkError: it has.
        """
        epoch = (await self.softprune_status() or {}).get("mask_epoch")
        if epoch != self._epoch:
            raise BenchmarkError(batch, repeat, None, f"mask epoch {epoch}: someone switched the mask meanwhile", f"epoch {self._epoch}")

    async def text(self, path: str) -> tuple[int, str]:
        """(status, body) of one of the engine's own pages; raises `BenchmarkError` if nobody answers."""
        status, body = await self._fetch(path)
        return status, body.decode(errors="replace")

    async def _get(self, path: str, headers: dict[str, str] | None = None, place: tuple[int, int] | None = None) -> tuple[int, Any]:
        status, body = await self._fetch(path, headers, place)
        try:
            return status, json.loads(body)
        except ValueError:
            return status, None

    async def _fetch(self, path: str, headers: dict[str, str] | None = None, place: tuple[int, int] | None = None) -> tuple[int, bytes]:
        batch, repeat = place or (None, None)
        try:
            async with self._session.get(self.url + path, headers=headers) as response:
                return response.status, await response.read()
        except aiohttp.ServerTimeoutError:
            raise StallError(batch, repeat, None, f"no answer to {path} for {self._stall:g} s", "one") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ServerGoneError(batch, repeat, None, gone(error), "a server that listens") from None


class _Lateness:
    """How much later than it wants to this process runs.

    Attributes:
        worst: longest time so far, in seconds.
    """

    worst = 0.0

    async def watch(self) -> None:
        """Wake up again and again, until cancelled."""
        while True:
            due = time.perf_counter() + _WATCHED_S
            await asyncio.sleep(_WATCHED_S)
            self.worst = max(self.worst, time.perf_counter() - due)
