"""The control API around an engine of three small routers, whose log-probabilities depend on what they select.

Routers, masks, epochs and the API are softprune's own; only what an engine adds is made up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import uvicorn
from torch import nn

from softprune.checkpoint.families import ModelSpec
from softprune.control import ControlError, raise_answer, refusal_among
from softprune.control_api import ControlApi
from softprune.launch import Launch
from softprune.mask import ExpertMask
from softprune.mask_forms import build
from softprune.runtime.collector import Span
from softprune.runtime.epochs import Epochs
from softprune.runtime.masked_model import MaskedModel
from softprune.runtime.router_mask import Router
from softprune.runtime.tags import TAG_KEY, Tags
from tests.unit.fake_server import Behaviour, _openai, _sglang

LAYERS, EXPERTS, HIDDEN, TOP_K = 3, 8, 16, 2
SPEC = ModelSpec("GptOssForCausalLM", tuple(range(LAYERS)), EXPERTS, TOP_K)
LOG = logging.getLogger("softprune.fake")


def make_model(launch: Launch | None = None, seed: int = 0) -> MaskedModel:
    """A process's model; the same one for the same seed."""
    torch.manual_seed(seed)
    modules = [nn.Linear(HIDDEN, EXPERTS, dtype=torch.bfloat16) for _ in range(LAYERS)]
    weights = [(module.weight.data, module.bias.data) for module in modules]
    routers = [Router(f"layer {i}", module.bias.data, module) for i, module in enumerate(modules)]
    return MaskedModel(launch or make_launch(), SPEC, weights, routers, LOG)


def make_launch(**fields: Any) -> Launch:
    return Launch(**{"mask_hash": None, "top_k": TOP_K, "model_top_k": TOP_K, "control": True, **fields})


def make_mask(keep: list[list[int] | None], model: MaskedModel | None = None, top_k: int | None = None) -> ExpertMask:
    """A mask for `make_model`'s model."""
    fingerprint = model.fingerprint if model else None
    return build(SPEC, keep, fingerprint, {}, "test", top_k)


class FakeEngine:
    """The app underneath, and what its processes hold.

    Attributes:
        ranks: every process's model.
        seen: paths of the calls that reached it.
        step_s: seconds a token, without and with a mask.
        noise: added to log-probabilities, once for each answer; called without arguments.
        leaves_trace: log-probabilities stay shifted once a mask was in force.
    """

    def __init__(self, name: str = "vLLM 0.32.0", ranks: int = 1, seed: int = 0, launch: Launch | None = None) -> None:
        self.name, self.launch = name, launch or make_launch()
        self.ranks = [make_model(self.launch, seed) for _ in range(ranks)]
        self.epochs = Epochs(self.launch.mask_hash)
        self.seen: list[str] = []
        self.step_s = (0.0, 0.0)
        self.noise: Callable[[], float] = lambda: 0.0
        self.leaves_trace = False
        if self.launch.stats:
            collector = self.ranks[0].add_collector(64, name)
            for layer, router in enumerate(self.ranks[0].routers.routers):
                hidden = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
                collector.record(layer, hidden, router.forward(hidden))
        if self.launch.debug_routes:
            self.ranks[0].add_probe()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope["path"])
        body = b""
        while (message := await receive()).get("more_body") or message.get("body"):
            body += message["body"]
            if not message.get("more_body"):
                break
        if scope["path"] == "/v1/models":
            await _answer(send, 200, b'{"object": "list", "data": [{"id": "served-name"}]}')
            return
        if scope["path"] not in ("/v1/completions", "/generate"):
            await _answer(send, 404, b'{"detail": "Not Found"}')
            return
        request = json.loads(body)
        native = scope["path"] == "/generate"
        prompt = request["input_ids" if native else "prompt"]
        length = request["sampling_params"]["max_new_tokens"] if native else request["max_tokens"]
        if not request.get("stream"):
            parameters = (request["sampling_params"].get("custom_params") if native else request.get("vllm_xargs")) or {}
            await _answer(send, 200, json.dumps(self.scored(native, prompt, length, parameters.get(TAG_KEY))).encode())
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for has in range(1, length + 1):
            await asyncio.sleep(self.step_s[self.ranks[0].routers.mask is not None])
            event = (_sglang if native else _openai)(Behaviour(), len(prompt), has, 1, length)
            await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def scored(self, native: bool, prompt: list[int], length: int, tag: str | None = None) -> dict[str, Any]:
        """An answer with log-probabilities of prompt and answer."""
        tokens, found = list(prompt), self.run(prompt, tag, len(prompt))
        for number in range(length):
            tokens.append(100 + int(-found[-1] * 1000) % 900)
            # The last token of an answer is never run.
            found.append(self.run(tokens[-1:], tag)[0] if number < length - 1 else found[-1])
        changed = self.leaves_trace and self.ranks[0].routers.mask is None and any(self.epochs.masks)
        shift = self.noise() + (0.01 if changed else 0.0)
        scored = [(value + shift, token) for value, token in zip(found, tokens, strict=True)]
        before, after = scored[: len(prompt)], scored[len(prompt) :]
        if native:
            ins = [[None, prompt[0], None], *([value, token, None] for value, token in before[1:])]
            meta = {"id": "a1", "input_token_logprobs": ins, "output_token_logprobs": [[value, token, None] for value, token in after]}
            return {"text": "", "meta_info": meta}
        ins = [None, *({str(token): {"logprob": value, "rank": 1}} for value, token in before[1:])]
        outs = {"tokens": [f"token_id:{token}" for _, token in after], "token_logprobs": [value for value, _ in after]}
        return {"id": "cmpl-1", "choices": [{"index": 0, "text": "", "logprobs": outs, "prompt_logprobs": ins}]}

    @torch.no_grad()
    def run(self, tokens: list[int], tag: str | None = None, prompt: int = 0) -> list[float]:
        """A step: route each token in each layer, count what was selected, make log-probabilities of it.

        Args:
            tokens: of one request.
            tag: the request's.
            prompt: so many of them are prefill.
        """
        model = self.ranks[0]
        hidden = torch.stack([torch.randn(HIDDEN, generator=torch.Generator().manual_seed(token)) for token in tokens]).bfloat16()
        total = torch.zeros(len(tokens))
        for layer, router in enumerate(model.routers.routers):
            values, ids = router.forward(hidden).float().topk(TOP_K)
            total += (values.softmax(-1) * (ids + 1)).sum(-1)
            if model.probe is not None:
                model.probe.record_ids(layer, ids)
            if model.collector is not None:
                model.collector.record(layer, hidden, router.forward(hidden))
        if model.collector is not None:
            model.collector.step([Span(model.collector.tag_number(tag), prompt, 0, len(tokens))])
        return [-float(value) for value in total]


class EngineKey:
    """An engine's own guard before all of its routes, as SGLang's with --api-key."""

    def __init__(self, app: Any, key: str) -> None:
        self.app, self.wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if dict(scope["headers"]).get(b"authorization") == self.wanted:
            await self.app(scope, receive, send)
        else:
            await _answer(send, 401, b'{"error": "Unauthorized"}')


class FakeControl(ControlApi):
    """The control API of a `FakeEngine`.

    Attributes:
        switches: what befalls the next switches, in order: an error is raised instead of it, a number of seconds is waited
            after it, None is nothing.
    """

    def __init__(self, engine: FakeEngine, key: str | None = "right") -> None:
        super().__init__(engine, key)
        self.engine = engine
        self.switches: list[Exception | float | None] = []
        self.asked: list[tuple[str | None, str]] = []
        self.at_once = 0
        self.tags = Tags(engine.launch.num_tags) if engine.launch.stats else None

    @staticmethod
    def tag_places(path: str, body: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        return [(body, "vllm_xargs")]

    async def launch(self, scope: Any) -> Launch:
        return self.engine.launch

    async def ask(self, scope: Any, what: str, **arguments: Any) -> list[Any]:
        return [getattr(model, what)(**arguments) for model in self.engine.ranks]

    async def ask_scheduler(self, scope: Any, what: str, **arguments: Any) -> Any:
        epochs = self.engine.epochs
        if what == "status":  # some tests put masks into the routers past the API
            mask = self.engine.ranks[0].routers.mask
            return {**epochs.status(), "mask_hash": mask.hash if mask else None}
        return {"request": lambda: epochs.of(arguments["name"]), "tokens": lambda: epochs.tokens}[what]()

    async def switch(self, scope: Any, text: str | None, in_flight: str) -> dict[str, Any]:
        self.asked.append((text, in_flight))
        fault = self.switches.pop(0) if self.switches else None
        if isinstance(fault, Exception):
            raise fault
        self.at_once += 1
        try:
            assert self.at_once == 1, "two switches at once"
            await asyncio.sleep(0)
            refused = refusal_among([model.stage(text) for model in self.engine.ranks])
            if refused:
                for model in self.engine.ranks:
                    model.drop()
                raise_answer(refused)
            ranks = [model.commit() for model in self.engine.ranks]
            mask = self.engine.ranks[0].routers.mask
            epoch = self.engine.epochs.switch(mask.hash if mask else None)
            await asyncio.sleep(fault or 0)
        finally:
            self.at_once -= 1
        return {"epoch": epoch, "ranks": ranks}

    def about(self, scope: Any) -> dict[str, Any]:
        return {"engine": self.engine.name, "model": "/data/models/fake"}

    @property
    def in_force(self) -> ExpertMask | None:
        return self.engine.ranks[0].routers.mask


class ServedFake:
    """A `FakeControl` on a port of its own, behind an engine's key if one is given; a context manager."""

    def __init__(self, api: FakeControl | None = None, engine_key: str | None = None) -> None:
        self.api = api or FakeControl(FakeEngine())
        self.app = EngineKey(self.api, engine_key) if engine_key else self.api
        self.engine = self.api.engine

    def __enter__(self) -> ServedFake:
        self._server = uvicorn.Server(uvicorn.Config(self.app, port=0, lifespan="off", log_level="error", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def _run(self) -> None:
        torch.set_num_threads(1)  # on a busy machine, small products wait for threads a hundred times longer than they take
        self._server.run()

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)


REFUSED = ControlError(409, "refused", "not now")


async def _answer(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
