"""The control API on vLLM's own HTTP port, as an ASGI middleware that `--middleware` takes.

When the server starts up, and before it answers anything, every worker is asked whether it serves the mask
that was asked for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from softprune import control_api
from softprune.control import PREFIX, ControlError, raise_answer, server_key
from softprune.launch import Launch
from softprune.runtime.epochs import RequestIndex
from softprune.runtime.tags import Tags
from softprune.vllm_ext import seams
from softprune.vllm_ext.flags import EPOCHS_KEY, launch_of

logger = logging.getLogger("vllm.softprune")


class ControlApi(control_api.ControlApi):
    """The control API, asking vLLM's workers by collective RPC and its engine core by a call of its own."""

    log = logger

    def __init__(self, app: Any) -> None:
        super().__init__(app, None, RequestIndex(names=seams.call_ids))

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

    async def ask_scheduler(self, scope: Any, what: str, **arguments: Any) -> Any:
        client = seams.attribute(self._client(scope), "engine_core", seams.CALL_UTILITY.name)
        return await client.call_utility_async("softprune_call", what, arguments)

    async def switch(self, scope: Any, text: str | None, in_flight: str) -> dict[str, Any]:
        if in_flight == "retract":
            raise ControlError(409, "in_flight_not_supported", "in_flight=retract: vLLM has no call for it; there are continue and drain")
        async with self._drained(scope) if in_flight == "drain" else nullcontext():
            done: dict[str, Any] = await self.ask_scheduler(scope, "switch", text=text)
        if "refused" in done:
            raise_answer(done["refused"])
        return done

    @asynccontextmanager
    async def _drained(self, scope: Any) -> AsyncIterator[None]:
        """Let running requests finish and new ones wait, until the block has ended."""
        client = self._client(scope)
        if await client.is_paused():
            raise ControlError(409, "engine_is_paused", "in_flight=drain: somebody else has paused the engine; expected a running one")
        try:
            await client.pause_generation(mode="wait", clear_cache=False)
            yield
        finally:
            await client.resume_generation()

    def about(self, scope: Any) -> dict[str, Any]:
        return {"engine": seams.engine(), "model": self._client(scope).vllm_config.model_config.model}

    @staticmethod
    def tag_places(path: str, body: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        if path.endswith("/generate"):
            sampling = body.get("sampling_params")
            return [(sampling, "extra_args")] if isinstance(sampling, dict) else []
        return [(body, "vllm_xargs")]

    def _client(self, scope: Any) -> Any:
        return seams.attribute(scope["app"].state, "engine_client", "http.app_state")

    async def _start(self, scope: Any) -> None:
        """Refuse to serve unless every worker serves what was asked for."""
        launch = await self.launch(scope)
        seams.check(seams.CONTROL_API)
        statuses = await self.ask(scope, "status")
        for rank, status in enumerate(statuses):
            control_api.check_served(launch, rank, status)
        self._take_epochs(seams.attribute(self._client(scope), "output_processor", seams.PROCESS_OUTPUTS.name))
        self.publish((await self.ask_scheduler(scope, "status"))["mask_epoch"], statuses[0])
        if launch.stats is not None:
            self.tags = Tags(launch.num_tags)
        args = seams.attribute(scope["app"].state, "args", "http.app_state")
        self.key, path = server_key(args.port)
        if path:
            logger.warning("softprune: control API at %s; its key was generated and lies in %s", PREFIX, path)

    def _take_epochs(self, processor: Any) -> None:
        """Take the epochs out of what the engine core sends of finished requests."""
        process = processor.process_outputs

        @functools.wraps(process)
        def process_outputs(engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
            for output in engine_core_outputs:
                parameters = output.kv_transfer_params
                if parameters and EPOCHS_KEY in parameters:
                    epochs = parameters.pop(EPOCHS_KEY)
                    output.kv_transfer_params = parameters or None
                    if epochs:
                        self.finished.add(output.request_id, epochs)
            return process(engine_core_outputs, *args, **kwargs)

        processor.process_outputs = process_outputs
