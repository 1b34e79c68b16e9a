"""The control API as an ASGI middleware, the same for every engine.

Everything under /softprune/v1 is answered here and nothing of it without the key; all else passes through.
An extension says how to ask its engine.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any
from urllib.parse import parse_qs

from softprune.control import KEY_HEADER, PREFIX, error_body, key_matches
from softprune.errors import RefusedError
from softprune.launch import Launch


class ControlApi(ABC):
    """ASGI middleware; one for each server.

    Attributes:
        app: what answers everything else.
        key: softprune's own key; while it is None, every call is answered 401.
    """

    def __init__(self, app: Any, key: str | None = None) -> None:
        self.app = app
        self.key = key

    @abstractmethod
    async def launch(self, scope: Any) -> Launch:
        """What the server was asked for."""

    @abstractmethod
    async def ask(self, scope: Any, what: str, **arguments: Any) -> list[Any]:
        """Ask every process that holds routers for "status" or "routes"; one answer from each."""

    @abstractmethod
    def about(self, scope: Any) -> dict[str, Any]:
        """{"engine": name and version, "model": as given}."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path == PREFIX or path.startswith(PREFIX + "/"):
                try:
                    status, body = await self._answer(scope, path.removeprefix(PREFIX))
                except RefusedError as error:
                    status, body = 409, error_body("refused", str(error))
                await _send_json(send, status, body)
                return
        await self.app(scope, receive, send)

    async def _answer(self, scope: Any, path: str) -> tuple[int, Any]:
        headers = {name.lower(): value for name, value in scope["headers"]}
        sent = headers.get(KEY_HEADER.lower().encode(), b"").decode("latin-1")
        if self.key is None or not key_matches(sent, self.key):
            return 401, error_body("unauthorized", f"softprune's own key is missing or wrong; send it in {KEY_HEADER}")
        match scope["method"], path:
            case "GET", "/status":
                return 200, {**self.about(scope), **(await self.ask(scope, "status"))[0]}
            case ("GET" | "DELETE") as method, "/routes":
                trace = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("trace") == ["1"]
                return await self._routes(scope, reset=method == "DELETE", trace=trace)
        return 404, error_body("not_found", f"no {scope['method']} {PREFIX}{path}; there are GET status, GET routes, DELETE routes")

    async def _routes(self, scope: Any, reset: bool, trace: bool) -> tuple[int, Any]:
        if not (await self.launch(scope)).debug_routes:
            return 409, error_body("probe_is_off", "start the server with --softprune-debug-routes")
        answers = await self.ask(scope, "routes", reset=reset, trace=trace)
        if any(answer != answers[0] for answer in answers):
            return 500, error_body("ranks_disagree", "the processes' routers selected differently", answers)
        return 200, answers[0]


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


async def _send_json(send: Any, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
