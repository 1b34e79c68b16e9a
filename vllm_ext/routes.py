"""The control API on vLLM's own HTTP port, as an ASGI middleware that `--middleware` takes.

Everything under /softprune/v1 is answered here and nothing of it without the key; all else passes
through. When the server starts up, and before it answers anything, every worker is asked whether it
serves the mask that was asked for.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from softprune.control import KEY_HEADER, PREFIX, error_body, key_matches, server_key
from softprune.errors import RefusedError
from softprune.vllm_ext import seams
from softprune.vllm_ext.flags import launch_of

logger = logging.getLogger("vllm.softprune")


class ControlApi:
    """ASGI middleware; one for each server."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.key: str | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            try:
                await self._start(scope["app"].state)
            except Exception as error:
                # Only this message makes an ASGI server stop; an exception it would take for "no lifespan support".
                logger.exception("softprune: the server does not start")
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path == PREFIX or path.startswith(PREFIX + "/"):
                status, body = await self._answer(scope, path.removeprefix(PREFIX))
                await _send_json(send, status, body)
                return
        await self.app(scope, receive, send)

    async def _start(self, state: Any) -> None:
        """Refuse to serve unless every worker serves what was asked for."""
        client = seams.attribute(state, "engine_client", "http.app_state")
        launch = launch_of(seams.attribute(client, "vllm_config", seams.ADDITIONAL_CONFIG.name))
        for rank, worker in enumerate(await client.collective_rpc("softprune_status")):
            served = (worker["mask"] or {}).get("hash")
            if served != launch.mask_hash or worker["top_k"] != launch.top_k:
                raise RefusedError(
                    f"worker {rank}: serves mask {served}, top_k {worker['top_k']}; expected {launch.mask_hash}, {launch.top_k}"
                )
        args = seams.attribute(state, "args", "http.app_state")
        self.key, path = server_key(args.port)
        if path:
            logger.warning("softprune: control API at %s; its key was generated and lies in %s", PREFIX, path)

    async def _answer(self, scope: Any, path: str) -> tuple[int, Any]:
        headers = {name.lower(): value for name, value in scope["headers"]}
        sent = headers.get(KEY_HEADER.lower().encode(), b"").decode("latin-1")
        if self.key is None or not key_matches(sent, self.key):
            return 401, error_body("unauthorized", f"softprune's own key is missing or wrong; send it in {KEY_HEADER}")
        client = scope["app"].state.engine_client
        match scope["method"], path:
            case "GET", "/status":
                return 200, await self._status(client)
            case "GET", "/routes":
                return await self._routes(client, reset=False)
            case "DELETE", "/routes":
                return await self._routes(client, reset=True)
        return 404, error_body("not_found", f"no {scope['method']} {PREFIX}{path}; there are GET status, GET routes, DELETE routes")

    async def _status(self, client: Any) -> dict[str, Any]:
        workers = await client.collective_rpc("softprune_status")
        return {"engine": seams.engine(), "model": client.vllm_config.model_config.model, **workers[0]}

    async def _routes(self, client: Any, reset: bool) -> tuple[int, Any]:
        if not launch_of(client.vllm_config).debug_routes:
            return 409, error_body("probe_is_off", "start the server with --softprune-debug-routes")
        workers = await client.collective_rpc("softprune_routes", kwargs={"reset": reset})
        if any(worker != workers[0] for worker in workers):
            return 500, error_body("ranks_disagree", "the workers' routers selected differently", workers)
        return 200, workers[0]


async def _send_json(send: Any, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
