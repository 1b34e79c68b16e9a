"""The largest batch that a server decodes to the end: all of it at once, nothing preempted, no error.

A size is tried with one pass of `softprune.bench.decode`. That all its requests ran at once is seen in the streams, each of which has its
first token before any has its last, or in the engine's gauge of running requests, which engines update now and then; of answers so short
that neither ever shows it, the size found is too small. Preemptions (vLLM) and retractions (SGLang) are read from the engine's metrics.
The size that is found has to run again, as often as its throughput is measured. A search that ends for want of time goes on from its own
document.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from softprune.bench import engine_metrics
from softprune.bench.batch_limits import cap_of, most_together, start_of
from softprune.bench.bracket import Bracket
from softprune.bench.client import DecodeClient
from softprune.bench.decode import about, check_sizes, head
from softprune.bench.errors import BenchmarkError
from softprune.bench.figures import summary
from softprune.bench.prompts import Api, Workload
from softprune.errors import InputError
from softprune.server_client import without_address
from softprune.signals import run_async

FORMAT, VERSION = "softprune.max-batch", 1
POLL_SECONDS = 0.1
IDLE_SECONDS = 60.0
"""Longest wait for requests of others, or of a pass that was given up."""


@dataclass(frozen=True)
class Try:
    """One pass, and whether its size ran.

    Attributes:
        batch: its size.
        kind: "search", or "repeat" of the size that was found.
        why: None if it ran; else "error", "preempted" or "queued".
        preempted: requests that were, by the engine's metrics.
        max_running: most requests that the engine's gauge showed; engines update it now and then only.
        max_waiting: likewise, of waiting ones.
        together: how many requests ran at once by what the streams show; None without streaming.
        error: what went wrong.
        figures: of the pass, without its streams; None after an error, and where a preemption was seen, which ends a pass.
    """

    batch: int
    kind: Literal["search", "repeat"]
    why: str | None
    preempted: int
    max_running: int
    max_waiting: int
    together: int | None
    error: str | None
    figures: dict[str, Any] | None

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        record = asdict(self)
        figures = record.pop("figures") or {}
        return {**record, "ok": self.why is None, **{name: figures.get(name) for name in ("total_tok_s", "decode_tok_s", "wall_s")}}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Try:
        """A try from its `record`; without its figures."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name != "figures"}, figures=None)

    @property
    def at_once(self) -> int:
        """How many requests ran at once, as far as is known."""
        return max(self.max_running, self.together or 0)

    @property
    def reason(self) -> str:
        """Why it did not run, in a sentence."""
        if self.why == "error":
            return f"error at {self.batch}: {self.error}"
        if self.why == "preempted":
            so_far = "" if self.figures else " by the time that one was seen"
            return f"{self.preempted} of {self.batch} requests were preempted{so_far}"
        return f"queued: of {self.batch} requests at most {self.at_once} ran at once (KV room, or the engine's cap on running requests)"


def max_batch(
    url: str, workload: Workload, most: int = 1024, start: int | None = None, step: int = 1, repeats: int = 3, stream: bool = True, *,
    max_running: int | None = None, api: Api | Literal["auto"] = "auto", key: str | None = None, engine_key: str | None = None,
    gpu: str | None = None, notes: Mapping[str, str] | None = None, stall_seconds: float = 60.0,
    progress: Callable[[Try, int], None] | None = None, into: dict[str, Any] | None = None, until: float | None = None,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Find the largest batch, and measure it; not for callers inside an event loop.

    Args:
        url, workload, stream, api, key, engine_key, gpu, notes, stall_seconds: as for `decode.measure`.
        most: no larger batch is tried.
        start: the first one; None for what the KV room should hold, or 8 if the engine does not tell it.
        step: the answer may be so much too small, less one; 1 finds it exactly.
        repeats: passes of the batch that is found; all have to run.
        max_running: the engine's own cap on running requests, where it does not tell (vLLM's --max-num-seqs).
        progress: called with every try, and their number.
        into: filled with the document while it grows.
        until: of `time.monotonic`; no try is begun that would end later if it took as long as the longest so far. None for no end.
        earlier: a document whose search ran out of time; its search goes on here if server and workload are the same ("resumed" tells how
            many of its tries were taken), with repeats measured anew.

    Returns:
        The raw document, JSON-ready, without host names and paths. Where time ran out, "out_of_time" is true, "max_batch" and "result" are
        None, and "limit" says between which sizes the answer lies.

    Raises:
        InputError: a number out of range.
        BenchmarkError: the engine has no metrics or other requests run, or the server went away; `partial` holds the document.
    """
    check_sizes([most], repeats, 0)
    for name, found in (("start", start), ("step", step), ("max_running", max_running)):
        if found is not None and found < 1:
            raise InputError("benchmark", name, str(found), "at least 1")
    document = {} if into is None else into
    document.update(head(FORMAT, VERSION, notes))

    async def run() -> None:
        async with DecodeClient(url, workload, api, stream, key=key, engine_key=engine_key, stall_seconds=stall_seconds) as client:
            document.update(await about(client, gpu))
            trial = _Trial(client)
            await trial.warm_up()
            metrics = await engine_metrics.read(client)
            memory = engine_metrics.memory_of(client.flags, metrics)
            cap, whose = cap_of(client.flags, max_running, most)
            first, jump = start_of(start, memory["kv_tokens"], workload)
            settings = {**asdict(workload), "stream": stream, "api": client.api, "stall_seconds": stall_seconds, "start": min(first, cap)}
            settings |= {"max": most, "max_running": max_running, "step": step, "repeats": repeats}
            document.update(settings=settings, memory=memory, tries=[], max_batch=None, limit=None, next_failed=None)
            document.update(not_monotone=[], result=None, error=None, out_of_time=False, resumed=0)
            bracket = Bracket(first, cap, jump, step)
            failures: dict[int, Try] = {}
            passes: list[dict[str, Any]] = []
            longest = 0.0

            def take(tried: Try) -> None:
                bracket.told(tried.batch, tried.why is None, tried.at_once if tried.why == "queued" else None, tried.max_waiting > 0)
                if tried.why is not None:
                    failures[tried.batch] = tried

            if earlier is not None and _same_search(earlier, document):
                document.update(tries=list(earlier["tries"]), resumed=len(earlier["tries"]))
                for record in earlier["tries"]:
                    take(Try.of(record))

            async def attempt(size: int, kind: Literal["search", "repeat"]) -> bool:
                nonlocal longest
                began = time.monotonic()
                if until is not None and began + longest > until:
                    raise _OutOfTimeError
                tried = await trial.attempt(size, kind)
                longest = max(longest, time.monotonic() - began)
                document["tries"].append(tried.record())
                take(tried)
                if tried.why is None and kind == "repeat":
                    assert tried.figures is not None
                    passes.append(tried.figures)
                if progress:
                    progress(tried, len(document["tries"]))
                return tried.why is None

            async def search() -> None:
                """Until a size that was found runs `repeats` times more, or not even 1 runs."""
                while True:
                    while (size := bracket.next()) is not None:
                        await attempt(size, "search")
                    found = bracket.low
                    passes.clear()
                    while found and len(passes) < repeats and await attempt(found, "repeat"):
                        pass
                    if not found or len(passes) == repeats:
                        return

            try:
                await search()
            except _OutOfTimeError:
                at_most = cap if bracket.high is None else bracket.high - 1
                document.update(out_of_time=True, next_failed=bracket.high, not_monotone=bracket.not_monotone)
                document["limit"] = f"not known: out of time with the answer between {bracket.low} and {at_most}"
                return
            document.update(max_batch=bracket.low or None, next_failed=bracket.high, not_monotone=bracket.not_monotone)
            document["limit"] = whose if bracket.high is None else failures[bracket.high].reason
            document["result"] = summary(bracket.low, passes) if passes else None

    try:
        run_async(run())
    except BenchmarkError as error:
        if "tries" in document:
            document["error"] = without_address(str(error), {"the server": url})
            error.partial = document
        raise
    return document


class _OutOfTimeError(Exception):
    """No time for another try."""


def _same_search(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two documents are of searches on the same server, GPU and KV room, with the same requests."""
    asked = ("prompt_tokens", "max_new_tokens", "token_ids", "stream", "api", "max_running")
    alike = all(one.get(name) == other[name] for name in ("format", "version", "engine", "model", "gpu", "softprune"))
    same_room = (one.get("memory") or {}).get("kv_tokens") == other["memory"]["kv_tokens"]
    return alike and same_room and all(_plain(one["settings"].get(name)) == _plain(other["settings"][name]) for name in asked)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


class _Trial:
    """Tries sizes on one server."""

    def __init__(self, client: DecodeClient) -> None:
        self.client, self._number = client, 0

    async def warm_up(self) -> None:
        """One request, after which the engine has metrics to show."""
        await self.client.run_batch(1, 0)

    async def attempt(self, size: int, kind: Literal["search", "repeat"]) -> Try:
        """One pass.

        Raises:
            BenchmarkError: nothing can be told, since the server went away or others use it.
        """
        before = await self._settled()
        self._number += 1
        seen = [before]
        tried = asyncio.create_task(self.client.run_batch(size, self._number))
        watch = asyncio.create_task(self._watch(seen, before.preempted))
        result, error = None, None
        try:
            await asyncio.wait((tried, watch), return_when=asyncio.FIRST_COMPLETED)
            if not (watch.done() and watch.exception() is None):
                result = await tried
        except BenchmarkError as found:
            error = found
        finally:
            tried.cancel()
            watch.cancel()
            await asyncio.gather(tried, watch, return_exceptions=True)
        after = await self._settled()  # raises if the server is gone
        preempted, together = after.preempted - before.preempted, most_together(result) if result and self.client.stream else None
        running, waiting = (max(getattr(load, name) for load in seen) for name in ("running", "waiting"))
        why: str | None
        if error is not None:
            why = "error"
        elif preempted:
            why = "preempted"
        else:
            why = "queued" if max(running, together or 0) < size else None
        told = None if error is None else without_address(str(error), {"the server": self.client.url})
        figures = result.figures() if result else None
        if figures is not None:
            del figures["streams"]
        return Try(size, kind, why, preempted, running, waiting, together, told, figures)

    async def _settled(self) -> engine_metrics.Load:
        """The engine's load once nothing runs or waits; those of a pass that failed are given up, which engines take a moment for."""
        deadline = time.monotonic() + IDLE_SECONDS
        while True:
            load = await self._load()
            if not load.running and not load.waiting:
                return load
            if time.monotonic() > deadline:
                found = f"{load.running} requests running and {load.waiting} waiting, none of them ours"
                raise BenchmarkError(None, None, None, found, "a server that nobody else uses")
            await asyncio.sleep(POLL_SECONDS)

    async def _load(self) -> engine_metrics.Load:
        return engine_metrics.load_of(await engine_metrics.read(self.client), self.client.engine["name"])

    async def _watch(self, seen: list[engine_metrics.Load], preempted: int) -> None:
        """Look at the engine's load until a request is preempted: a pass that has failed need not be waited for."""
        while True:
            load = await self._load()
            seen.append(load)
            if load.preempted > preempted:
                return
            await asyncio.sleep(POLL_SECONDS)
