"""The control API on SGLang's own HTTP port, as an ASGI middleware around its app."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from softprune import control_api
from softprune.control import PREFIX, raise_answer, server_key
from softprune.launch import Launch
from softprune.runtime.epochs import RequestIndex
from softprune.runtime.tags import Tags
from softprune.sglang_ext import seams
from softprune.sglang_ext.flags import OVERRIDES, launch_in, served_at_start
from softprune.sglang_ext.scheduler import EPOCHS_KEY
from softprune.sglang_ext.worker import CARRIER

logger = logging.getLogger("sglang.softprune")

POLL_SECONDS = 0.01
"""Between two looks at a switch that waits for running requests."""

FINISHED = RequestIndex()
"""Epochs of the requests whose last output has reached this process."""


class ControlApi(control_api.ControlApi):
    """The control API, asking SGLang's scheduler processes through its tokenizer manager."""

    log = logger

    def __init__(self, app: Any, key: str, launch: Launch, model: str, tokenizer_manager: Any) -> None:
        super().__init__(app, key)
        self.finished = FINISHED
        self._launch, self._model, self._manager = launch, model, tokenizer_manager
        self.tags = None if launch.stats is None else Tags(launch.num_tags)

    async def launch(self, scope: Any) -> Launch:
        return self._launch

    async def ask(self, scope: Any, what: str, **arguments: Any) -> list[Any]:
        ranks: list[Any] = await self._call(what, **arguments)
        return ranks

    async def ask_scheduler(self, scope: Any, what: str, **arguments: Any) -> Any:
        return await self._call(f"scheduler.{what}", **arguments)

    async def switch(self, scope: Any, text: str | None, in_flight: str) -> dict[str, Any]:
        done = await self._call("switch", text=text, in_flight=in_flight)
        while done is None:  # it waits for running requests; SGLang answers one such message at a time, so none is kept open
            await asyncio.sleep(POLL_SECONDS)
            done = await self._call("switched")
        return dict(done)

    @staticmethod
    def tag_places(path: str, body: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        if path != "/generate":
            return [(body, "custom_params")]
        if body.get("sampling_params") is None:
            body["sampling_params"] = {}
        given = body["sampling_params"]
        return [(one, "custom_params") for one in (given if isinstance(given, list) else [given]) if isinstance(one, dict)]

    async def _call(self, what: str, **arguments: Any) -> Any:
        """Ask the scheduler processes; the first one answers, for itself or for all.

        Raises:
            ControlError: it is refused.
        """
        request = seams.DUMPER_REQUEST.resolve()(method=CARRIER + what, body=arguments)
        answers = await self._manager.dumper_control(request)
        response = answers[0].response[0]
        if "refused" in response:
            raise_answer(response["refused"])
        return response["answer"]

    def about(self, scope: Any) -> dict[str, Any]:
        return {"engine": seams.engine(), "model": self._model}


def add_control_api(server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    """Before SGLang's HTTP server runs. SGLang adds the check of its own key later, so that one comes first."""
    launch = launch_in(seams.setting(server_args, OVERRIDES))
    if launch is None:
        return
    from sglang.srt.entrypoints.http_server import app

    key, path = server_key(server_args.port)
    app.add_middleware(ControlApi, key=key, launch=launch, model=str(server_args.model_path), tokenizer_manager=tokenizer_manager)
    status = served_at_start()
    if status is not None:
        ControlApi.publish(0, status)
    if path:
        logger.warning("softprune: control API at %s; its key was generated and lies in %s", PREFIX, path)


def take_epochs(manager: Any, recv_obj: Any, *args: Any, **kwargs: Any) -> None:
    """Before `TokenizerManager._handle_batch_output`: remember finished requests' epochs, and leave SGLang's finish reason as it was."""
    if served_at_start() is None:
        return
    for request_id, reason in zip(recv_obj.rids, recv_obj.finished_reasons, strict=False):
        if reason:
            epochs = reason.pop(EPOCHS_KEY, None)
            if epochs:
                FINISHED.add(request_id, epochs)
