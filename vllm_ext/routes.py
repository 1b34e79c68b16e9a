"""The control API on vLLM's own HTTP port, as an ASGI middleware that `--middleware` takes.

When the server starts up, and before it answers anything, every worker is asked whether it serves the mask
that was asked for.
"""

from __future__ import annotations

import logging
from typing import Any

from softprune import control_api
from softprune.control import PREFIX, server_key
from softprune.launch import Launch
from softprune.vllm_ext import seams
from softprune.vllm_ext.flags import launch_of

logger = logging.getLogger("vllm.softprune")


class ControlApi(control_api.ControlApi):
    """The control API, asking vLLM's workers by collective RPC."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            try:
                await self._start(scope)
            except Exception as error:
                # Only this message makes an ASGI server stop; an exception it would take for "no lifespan support".
                logger.exception("softprune: the server does not start")
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
        await super().__call__(scope, receive, send)

    async def launch(self, scope: Any) -> Launch:
        return launch_of(seams.attribute(self._client(scope), "vllm_config", seams.ADDITIONAL_CONFIG.name))

    async def ask(self, scope: Any, what: str, **arguments: Any) -> list[Any]:
        answers: list[Any] = await self._client(scope).collective_rpc(f"softprune_{what}", kwargs=arguments)
        return answers

    def about(self, scope: Any) -> dict[str, Any]:
        return {"engine": seams.engine(), "model": self._client(scope).vllm_config.model_config.model}

    def _client(self, scope: Any) -> Any:
        return seams.attribute(scope["app"].state, "engine_client", "http.app_state")

    async def _start(self, scope: Any) -> None:
        """Refuse to serve unless every worker serves what was asked for."""
        launch = await self.launch(scope)
        for rank, status in enumerate(await self.ask(scope, "status")):
            control_api.check_served(launch, rank, status)
        args = seams.attribute(scope["app"].state, "args", "http.app_state")
        self.key, path = server_key(args.port)
        if path:
            logger.warning("softprune: control API at %s; its key was generated and lies in %s", PREFIX, path)
