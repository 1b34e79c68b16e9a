"""The control API as an ASGI middleware, the same for every engine.

Everything under /softprune/v1 is answered here and nothing of it without the key; all else passes through, and what
the engine answers is told the mask epochs that it ran under. An extension says how to ask its engine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

from softprune.control import BODY, IN_FLIGHT, KEY_HEADER, PREFIX, ControlError, error_body, key_matches, raise_answer
from softprune.errors import MaskError, RefusedError
from softprune.launch import Launch
from softprune.mask import MAX_BYTES, ExpertMask, decode_json
from softprune.mask_state import kept_after
from softprune.metrics import mask_metrics, stats_metrics
from softprune.request_tags import with_tags
from softprune.response_epochs import PATHS, naming_epochs
from softprune.runtime.collector import file_of
from softprune.runtime.epochs import RequestIndex
from softprune.runtime.tags import Tags
from softprune.stats.request import StatsRequest

logger = logging.getLogger(__name__)

CALLS = (
    "GET status", "GET mask", "PUT mask", "DELETE mask", "GET requests/{id}", "POST verify", "GET routes", "DELETE routes",
    "POST stats/start", "POST stats/stop", "POST stats/reset", "GET stats",
)  # fmt: skip
"""Everything that is answered; each asks for the key."""
METRICS = "/metrics"
"""Where both engines let Prometheus read."""
SCRAPE_SECONDS = 1.0
_MAX_DEPTH = 50


class ControlApi(ABC):
    """ASGI middleware; one for each server.

    Attributes:
        app: what answers everything else.
        key: softprune's own key; while it is None, every call is answered 401.
        tags: of requests, with `--softprune-stats`; an extension sets it, and `tag_places`.
        finished: epochs of the requests whose last output has reached this process; an extension fills it.
        log: where switches are told of.
    """

    log: logging.Logger = logger

    def __init__(self, app: Any, key: str | None = None, finished: RequestIndex | None = None) -> None:
        self.app = app
        self.key = key
        self.finished = RequestIndex() if finished is None else finished
        self.tags: Tags | None = None
        self._switching = asyncio.Lock()
        self._switches: set[asyncio.Task[dict[str, Any]]] = set()
        self._scrape: asyncio.Task[None] | None = None
        self._scraped = 0.0

    @abstractmethod
    async def launch(self, scope: Any) -> Launch:
        """What the server was asked for."""

    @abstractmethod
    async def ask(self, scope: Any, what: str, **arguments: Any) -> list[Any]:
        """Ask every process that holds routers for "status", "mask_text", "verified", "routes" or "statistics"; one answer from each."""

    @abstractmethod
    async def ask_scheduler(self, scope: Any, what: str, **arguments: Any) -> Any:
        """Ask the process that launches steps for "status", "request" or "tokens" (scheduled in each epoch)."""

    @abstractmethod
    async def switch(self, scope: Any, text: str | None, in_flight: str) -> dict[str, Any]:
        """Put a mask in force, between two steps, in every process or in none.

        Args:
            scope: of the call.
            text: of a mask file; None for no mask.
            in_flight: one of `IN_FLIGHT`.

        Returns:
            {"epoch", "ranks": every process's new status}.

        Raises:
            ControlError: it was refused; the old mask stays.
        """

    @staticmethod
    @abstractmethod
    def tag_places(path: str, body: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        """Where a request's tag stands; see `softprune.request_tags.Places`."""

    @abstractmethod
    def about(self, scope: Any) -> dict[str, Any]:
        """{"engine": name and version, "model": as given}."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path == PREFIX or path.startswith(PREFIX + "/"):
                try:
                    status, body = await self._answer(scope, receive, path.removeprefix(PREFIX))
                except _HungUp:
                    return
                except Exception as error:
                    known = ControlError.of(error)
                    if known.status == 500:
                        self.log.exception("softprune: %s %s failed", scope["method"], path)
                    status, body = known.status, error_body(known.kind, str(known), known.detail)
                await (_send_file if isinstance(body, _File) else _send_json)(send, status, body)
                return
            if path in PATHS and scope["method"] == "POST" and self.tags is not None:
                try:
                    scope, receive, send = await with_tags(scope, receive, send, self.tags, self.tag_places)
                except ControlError as error:
                    await _send_json(send, error.status, error_body(error.kind, str(error), error.detail))
                    return
            if path in PATHS:
                send = naming_epochs(send, self.finished)
            if path.rstrip("/") == METRICS and self.tags is not None:
                await self._count_for_prometheus(scope)
        await self.app(scope, receive, send)

    async def _answer(self, scope: Any, receive: Any, path: str) -> tuple[int, Any]:
        headers = {name.lower(): value for name, value in scope["headers"]}
        sent = headers.get(KEY_HEADER.lower().encode(), b"").decode("latin-1")
        if self.key is None or not key_matches(sent, self.key):
            return 401, error_body("unauthorized", f"softprune's own key is missing or wrong; send it in {KEY_HEADER}")
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        match scope["method"], path:
            case "GET", "/status":
                return 200, await self._status(scope)
            case "GET", "/mask":
                text = _agreed(await self.ask(scope, "mask_text"), "masks")
                return 200, {"mask": None if text is None else json.loads(text)}
            case "PUT", "/mask":
                data = decode_json(await _body(headers, receive), BODY)
                _check_travels(data)
                return 200, await self._switch(scope, ExpertMask.parse(data, BODY), query)
            case "DELETE", "/mask":
                return 200, await self._switch(scope, None, query)
            case "GET", request if request.startswith("/requests/"):
                return await self._request(scope, unquote(request.removeprefix("/requests/")))
            case "POST", "/verify":
                refusals = [answer for answer in await self.ask(scope, "verified") if answer is not None]
                return 200, {"obeyed": not refusals, "detail": refusals[0]["message"] if refusals else None}
            case ("GET" | "DELETE") as method, "/routes":
                return 200, await self._routes(scope, reset=method == "DELETE", trace=query.get("trace") == ["1"])
            case "POST", "/stats/start":
                settings = await self._settings(scope, await _body(headers, receive))
                return 200, await self._statistics(scope, "start", **settings)
            case "POST", ("/stats/stop" | "/stats/reset") as action:
                return 200, await self._statistics(scope, action.removeprefix("/stats/"))
            case "GET", "/stats":
                found = await self._statistics(scope, "file", mask=query.get("mask", [None])[-1])
                return 200, _File(found["name"], await asyncio.to_thread(file_of, found))
        return 404, error_body("not_found", f"no {scope['method']} {PREFIX}{path}; there are {', '.join(CALLS)}")

    async def _status(self, scope: Any) -> dict[str, Any]:
        launch = await self.launch(scope)
        for _ in range(10):
            ranks, scheduler = await self.ask(scope, "status"), await self.ask_scheduler(scope, "status")
            hashes = [(rank["mask"] or {}).get("hash") for rank in ranks]
            # Two questions: a switch may have come between them.
            if hashes == [scheduler["mask_hash"]] * len(ranks):
                break
        else:
            raise ControlError(
                500, "ranks_disagree", "the processes' masks differ", {"workers": hashes, "scheduler": scheduler["mask_hash"]}
            )
        del scheduler["mask_hash"]
        state = launch.expert_mask_state
        return {
            **self.about(scope), **ranks[0], **scheduler,
            "launch_mask": launch.mask_hash, "state_file": state,
            "after_restart": "the mask in force" if state else "the launch mask",
        }  # fmt: skip

    async def _switch(self, scope: Any, mask: ExpertMask | None, query: dict[str, list[str]]) -> dict[str, Any]:
        in_flight = query.get("in_flight", ["continue"])[-1]
        if in_flight not in IN_FLIGHT:
            raise ControlError(400, "invalid_in_flight", f"in_flight: found {in_flight!r}; expected one of {', '.join(IN_FLIGHT)}")
        # Shielded: a switch that has begun is finished, even if its client is gone. Held, since a loop holds its tasks weakly.
        task = asyncio.create_task(self._switch_in_turn(scope, mask, in_flight))
        self._switches.add(task)
        task.add_done_callback(self._switches.discard)
        return await asyncio.shield(task)

    async def _switch_in_turn(self, scope: Any, mask: ExpertMask | None, in_flight: str) -> dict[str, Any]:
        began = time.perf_counter()
        async with self._switching:
            launch, done = await self.launch(scope), None
            try:
                with kept_after(launch.expert_mask_state, mask, launch.top_k):
                    done = await self.switch(scope, None if mask is None else mask.dump(), in_flight)
            except BaseException as error:
                if done is None:
                    mask_metrics().refused()
                    raise
                self._switched(done, began)
                message = f"mask epoch {done['epoch']} is in force, but {launch.expert_mask_state} could not be written: {error}"
                raise ControlError(500, "state_not_written", message) from error
            seconds = self._switched(done, began)
        if launch.expert_mask_state is None:
            self.log.warning("softprune: mask epoch %d; a restart returns to the launch mask (no --expert-mask-state)", done["epoch"])
        return {"epoch": done["epoch"], "ms": round(1000 * seconds, 3), "in_flight": in_flight, "mask": done["ranks"][0]["mask"]}

    def _switched(self, done: dict[str, Any], began: float) -> float:
        """A switch took effect; the seconds that it took."""
        seconds = time.perf_counter() - began
        self.publish(done["epoch"], done["ranks"][0])
        mask_metrics().switched(seconds)
        return seconds

    async def _request(self, scope: Any, name: str) -> tuple[int, Any]:
        found = await self.ask_scheduler(scope, "request", name=name)
        if found is None:
            return 404, error_body("not_found", f"no request {name} among those running and the last 10,000 finished")
        return 200, found

    async def _routes(self, scope: Any, reset: bool, trace: bool) -> Any:
        if not (await self.launch(scope)).debug_routes:
            raise ControlError(409, "probe_is_off", "start the server with --softprune-debug-routes")
        routes = _agreed(await self.ask(scope, "routes", reset=reset, trace=trace), "routes")
        return {**routes, "scheduled_tokens": await self.ask_scheduler(scope, "tokens")}

    async def _settings(self, scope: Any, body: bytes) -> dict[str, Any]:
        """What the body of `POST stats/start` asks for.

        Raises:
            ControlError: 400, unless it is something that is collected; 409 if statistics are off.
        """
        await self._check_stats(scope)
        return StatsRequest.parse(body).settings

    async def _statistics(self, scope: Any, action: str, **arguments: Any) -> Any:
        await self._check_stats(scope)
        answers = [one for one in await self.ask(scope, "statistics", action=action, arguments=arguments) if one is not None]
        if len(answers) != 1:
            raise ControlError(500, "ranks_disagree", f"{len(answers)} processes collect statistics; expected one")
        if "refused" in answers[0]:
            raise_answer(answers[0]["refused"])
        if action != "file":
            stats_metrics().counted(answers[0]["answer"])
        return answers[0]["answer"]

    async def _count_for_prometheus(self, scope: Any) -> None:
        """Before /metrics is read: ask what was counted, as `GET status` does, once in `SCRAPE_SECONDS` at most.

        A step is told nothing for it. An engine that does not answer in time is not waited for: the figures are then those of before.
        """
        if self._scrape is None or (self._scrape.done() and time.monotonic() - self._scraped > SCRAPE_SECONDS):
            # Never cancelled: engines' calls to their processes may not survive it.
            self._scrape, self._scraped = asyncio.create_task(self._scrape_statistics(scope)), time.monotonic()
        await asyncio.wait({self._scrape}, timeout=SCRAPE_SECONDS)

    async def _scrape_statistics(self, scope: Any) -> None:
        try:
            for status in await self.ask(scope, "status"):
                if status["statistics"] is not None:
                    stats_metrics().counted(status["statistics"])
        except Exception:
            self.log.exception("softprune: no statistics for Prometheus")

    async def _check_stats(self, scope: Any) -> None:
        if (await self.launch(scope)).stats is None:
            raise ControlError(409, "statistics_are_off", "start the server with --softprune-stats router, reap or eaft")

    @staticmethod
    def publish(epoch: int, status: dict[str, Any]) -> None:
        """Tell Prometheus what is in force.

        Args:
            epoch: the mask's.
            status: a process's `MaskedModel.status`.
        """
        mask = status["mask"]
        mask_metrics().in_force(epoch, mask["num_kept"] if mask else [status["num_experts"]] * status["num_layers"])


def check_served(launch: Launch, rank: int, status: Any) -> None:
    """See that a process serves what was asked for, before the server answers anything.

    Args:
        launch: what was asked for.
        rank: the process, for the message.
        status: its `MaskedModel.status`, or whatever it sent instead.

    Raises:
        RefusedError: it serves something else.
    """
    mask = status.get("mask") if isinstance(status, dict) else None
    served = (mask or {}).get("hash"), status.get("top_k") if isinstance(status, dict) else None
    if served != (launch.mask_hash, launch.top_k):
        raise RefusedError(
            f"process {rank}: serves mask {served[0]}, top_k {served[1]}; expected {launch.mask_hash}, {launch.top_k}. "
            "Its log says whether softprune's plugin ran there."
        )
    collecting = status.get("statistics") if isinstance(status, dict) else None
    if launch.stats is not None and rank == 0 and (collecting is None or collecting["unhooked_layers"]):
        found = "no collector" if collecting is None else f"no logits of MoE layers {collecting['unhooked_layers']}"
        raise RefusedError(f"process {rank}: --softprune-stats: found {found}; expected every router's logits")


@dataclass(frozen=True)
class _File:
    """An answer that is a file to be downloaded."""

    name: str
    data: bytes


class _HungUp(Exception):
    """The client is gone before its body was read."""


async def _body(headers: dict[bytes, bytes], receive: Callable[[], Awaitable[dict[str, Any]]]) -> bytes:
    """A request's body, of which no more than `MAX_BYTES` is ever held.

    Raises:
        ControlError: 413, before it is read where its length is given.
    """
    too_large = ControlError(413, "body_too_large", f"{BODY}: found over 16 MB; expected at most 16 MB", {"limit": MAX_BYTES})
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 20 or int(length) > MAX_BYTES:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _HungUp
        body += message.get("body", b"")
        if len(body) > MAX_BYTES:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)


def _check_travels(data: Any) -> None:
    """See that decoded JSON can be encoded and decoded again anywhere: Python's limits differ with the depth of its stack.

    Raises:
        MaskError: it is nested too deep, or holds a number that JSON has no name for.
    """
    level = [data]
    for _ in range(_MAX_DEPTH):
        if any(isinstance(value, float) and not math.isfinite(value) for value in level):
            raise MaskError(BODY, "", "NaN or an infinite number", "numbers that JSON knows")
        children = (value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list))
        level = [child for some in children for child in some]
        if not level:
            return
    raise MaskError(BODY, "", "JSON nested too deep", f"at most {_MAX_DEPTH} levels")


def _agreed(answers: list[Any], what: str) -> Any:
    """What all processes answered.

    Raises:
        ControlError: they answered differently.
    """
    if any(answer != answers[0] for answer in answers):
        raise ControlError(500, "ranks_disagree", f"the processes' {what} differ", answers)
    return answers[0]


async def _send_json(send: Any, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


async def _send_file(send: Any, status: int, file: _File) -> None:
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"content-length", str(len(file.data)).encode()),
        (b"content-disposition", f'attachment; filename="{file.name}"'.encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": file.data})
