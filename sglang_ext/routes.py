"""The control API on SGLang's own HTTP port, as an ASGI middleware around its app."""

from __future__ import annotations

import logging
from typing import Any

from softprune import control_api
from softprune.control import PREFIX, server_key
from softprune.errors import RefusedError
from softprune.launch import Launch
from softprune.sglang_ext import seams
from softprune.sglang_ext.flags import OVERRIDES, launch_in
from softprune.sglang_ext.worker import CARRIER

logger = logging.getLogger("sglang.softprune")


class ControlApi(control_api.ControlApi):
    """The control API, asking SGLang's scheduler processes through its tokenizer manager."""

    def __init__(self, app: Any, key: str, launch: Launch, model: str, tokenizer_manager: Any) -> None:
        super().__init__(app, key)
        self._launch, self._model, self._manager = launch, model, tokenizer_manager

    async def launch(self, scope: Any) -> Launch:
        return self._launch

    async def ask(self, scope: Any, what: str, **arguments: Any) -> list[Any]:
        request = seams.DUMPER_REQUEST.resolve()(method=CARRIER + what, body=arguments)
        answers = await self._manager.dumper_control(request)
        if not answers[0].success:
            raise RefusedError(answers[0].error)
        ranks: list[Any] = answers[0].response[0]["ranks"]
        return ranks

    def about(self, scope: Any) -> dict[str, Any]:
        return {"engine": seams.engine(), "model": self._model}


def add_control_api(server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    """Before SGLang's HTTP server runs. Added last, so it sees every request first."""
    launch = launch_in(seams.setting(server_args, OVERRIDES))
    if launch is None:
        return
    from sglang.srt.entrypoints.http_server import app

    key, path = server_key(server_args.port)
    app.add_middleware(ControlApi, key=key, launch=launch, model=str(server_args.model_path), tokenizer_manager=tokenizer_manager)
    if path:
        logger.warning("softprune: control API at %s; its key was generated and lies in %s", PREFIX, path)
