"""A server that answers like SGLang's or vLLM's at times that are known beforehand, in a process of its own.

`python -m tests.unit.fake_server` prints its ports; `FakeServer` runs that and sets its behaviour over HTTP. Shapes are those of
SGLang 0.5.17's and vLLM 0.32.0's HTTP servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.unit.noise import Noise


@dataclass(frozen=True)
class Behaviour:
    """What the fake server does.

    Attributes:
        engine: "sglang", "vllm" or "none"; decides what it says of itself.
        first_s, step_s: seconds to the first token, and from token to token, counted from the request's arrival.
        first_tokens, chunk: tokens in the first chunk, and in every later one; a chunk comes when its last token is due, the first
            one at first_s.
        fault: "short", "long", "prompt", "stall", "die", "cut" (ends without an end mark), "500", "error" (in the stream) or "late" (it
            begins when nothing else runs).
        faulty: index of the request, since the behaviour was set, that has the fault.
        text: SGLang with a tokenizer, whose chunks hold text as well as ids.
        cached: prompt tokens said to come from the prefix cache.
        key: of softprune's status; None for a server without softprune.
        noise: seed of the noise on the speed, which changes from pass to pass; a pass begins when a request finds none running.
        second: speed of requests to the second port, as a factor.
        capacity, full: so many requests run at once; what becomes of one more: "queue" (it waits), "preempt" (it runs, and is counted as
            preempted) or "error" (HTTP 503).
        metrics: whether there is a /metrics.
    """

    engine: str = "sglang"
    first_s: float = 0.3
    step_s: float = 0.01
    first_tokens: int = 1
    chunk: int = 1
    fault: str = ""
    faulty: int = 0
    text: bool = True
    cached: int = 0
    key: str | None = None
    noise: int | None = None
    second: float = 1.0
    capacity: int = 10_000
    full: str = "queue"
    metrics: bool = True


SGLANG_INFO = {
    "model_path": "/data/models/gpt-oss-20b/", "tokenizer_path": "/data/models/tok", "host": "gpu-box-7", "port": 30000, "tp_size": 2,
    "moe_runner_backend": "triton_kernel", "cuda_graph_max_bs": 64, "disable_radix_cache": True, "dtype": "bfloat16", "quantization": None,
    "launch_command": "python -m sglang.launch_server --model /data/models/gpt-oss-20b", "api_key": "sk-secret",
    "load_format": "/opt/loaders/odd_loader", "max_total_num_tokens": 123456, "internal_states": [{"memory_usage": {"weight": 12.5}}],
    "version": "0.5.17",
}  # fmt: skip
STATUS = {
    "engine": "fake", "model": "/data/models/gpt-oss-20b", "mask": {"hash": "sha256:ab", "num_kept": [24, 24]}, "top_k": 2,
    "fingerprint": "sha256:cd", "moe_backend": "triton", "moe_tiles": "mask", "device": "NVIDIA Fake",
}  # fmt: skip


class _App:
    def __init__(self) -> None:
        self.behaviour, self.log, self.known, self.served = Behaviour(), [], set(), 0
        self.second_port, self.factors, self.factor = 0, iter(()), 1.0
        self.running, self.waiting, self.preempted, self.free = 0, 0, 0, asyncio.Condition()
        self.app = web.Application()
        self.app.add_routes([web.get("/{path:.*}", self.get), web.post("/_behave", self.behave)])
        self.app.add_routes([web.post("/generate", self.generate), web.post("/v1/completions", self.generate)])

    async def behave(self, request: web.Request) -> web.Response:
        self.behaviour, self.log, self.served = Behaviour(**await request.json()), [], 0
        if self.behaviour.noise is not None:
            self.factors = Noise().factors(self.behaviour.noise)
        return web.json_response({})

    async def get(self, request: web.Request) -> web.Response:
        # Remembered to tell whether a later POST came on a connection that was open already.
        self.known.add(request.transport.get_extra_info("peername"))
        path, engine = request.path, self.behaviour.engine
        if path == "/metrics" and self.behaviour.metrics and engine != "none":
            return web.Response(text=self.metrics())
        model = {"id": "served-name", "object": "model", "root": "/data/models/gpt-oss-20b", "max_model_len": 4096}
        answers: dict[str, Any] = {"/_log": self.log}
        if engine != "none":
            answers["/v1/models"] = {"object": "list", "data": [model]}
            answers |= {"/version": {"version": "0.32.0"}} if engine == "vllm" else {"/server_info": SGLANG_INFO}
        if self.behaviour.key and path == "/softprune/v1/status":
            right = request.headers.get("X-Softprune-Key") == self.behaviour.key
            return web.json_response(STATUS if right else {"error": {}}, status=200 if right else 401)
        return web.json_response(answers[path]) if path in answers else web.json_response({"detail": "Not Found"}, status=404)

    def metrics(self) -> str:
        """As the engines write them; SGLang shows a counter only once it has counted."""
        if self.behaviour.engine == "vllm":
            config = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0'
            names, label = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:num_preemptions_total"), 'engine="0"'
        else:
            config, label = 'sglang:num_retracted_reqs{tp_rank="0"} 0.0', 'tp_rank="0",priority=""'
            names = ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:num_retracted_requests_total")
        values = (self.running, self.waiting, self.preempted)
        shown = [(name, value) for name, value in zip(names, values, strict=True) if value or not name.endswith("requests_total")]
        return "\n".join([f"# TYPE {names[0]} gauge", config, *(f"{name}{{{label}}} {value}.0" for name, value in shown)]) + "\n"

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """One request, once there is room for it."""
        if not self.running and self.behaviour.noise is not None:
            self.factor = next(self.factors)
        if self.running >= self.behaviour.capacity:
            if self.behaviour.full == "error":
                return web.json_response({"error": {"message": "no room"}}, status=503)
            self.preempted += self.behaviour.full == "preempt"
            if self.behaviour.full == "queue":
                self.waiting += 1
                async with self.free:
                    await self.free.wait_for(lambda: self.running < self.behaviour.capacity)
                self.waiting -= 1
        index, self.served = self.served, self.served + 1
        if self.behaviour.fault == "late" and index == self.behaviour.faulty:
            async with self.free:
                await self.free.wait_for(lambda: not self.running)
        self.running += 1
        try:
            return await self.answer(request, index)
        finally:
            self.running -= 1
            async with self.free:
                self.free.notify()

    async def answer(self, request: web.Request, index: int) -> web.StreamResponse:
        arrived, behaviour = asyncio.get_running_loop().time(), self.behaviour
        speed = self.factor * (behaviour.second if request.transport.get_extra_info("sockname")[1] == self.second_port else 1.0)
        behaviour = replace(behaviour, first_s=behaviour.first_s / speed, step_s=behaviour.step_s / speed)
        body = await request.json()
        self.log.append({"path": request.path, "open": request.transport.get_extra_info("peername") in self.known, "body": body})
        if index != behaviour.faulty:
            behaviour = replace(behaviour, fault="")
        if behaviour.fault == "500":
            return web.json_response({"error": {"message": f"no room in /opt/engine/pool.py {'x' * 300}"}}, status=500)
        native = request.path == "/generate"
        asked = body["sampling_params"]["max_new_tokens"] if native else body["max_tokens"]
        total = asked + {"short": -3, "long": 2}.get(behaviour.fault, 0)
        prompt = len(body["input_ids"] if native else body["prompt"]) - (behaviour.fault == "prompt")
        shape = _sglang if native else _openai
        if not body["stream"]:
            await _until(arrived + behaviour.first_s + (total - 1) * behaviour.step_s)
            if behaviour.fault == "stall":
                await asyncio.sleep(60)
            if behaviour.fault == "die":
                request.transport.abort()
            return web.Response(body=shape(behaviour, prompt, total, total, total), content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        async for has, new in _tokens(behaviour, arrived, total):
            if behaviour.fault in ("stall", "die", "cut", "error") and has >= total // 2:
                if behaviour.fault == "stall":
                    await asyncio.sleep(60)
                elif behaviour.fault == "die":
                    request.transport.abort()
                elif behaviour.fault == "error":
                    error = {"error": {"message": "CUDA out of memory", "type": "server_error", "code": 500}}
                    await response.write(b"data: " + _json(error) + b"\n\ndata: [DONE]\n\n")
                return response
            await response.write(b"data: " + shape(behaviour, prompt, has, new, total) + b"\n\n")
        if not native:
            usage = {"prompt_tokens": prompt, "total_tokens": prompt + total, "completion_tokens": total}
            if behaviour.cached:
                usage["prompt_tokens_details"] = {"cached_tokens": behaviour.cached}
            last = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "served-name", "choices": [], "usage": usage}
            await response.write(b"data: " + _json(last) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


async def _tokens(behaviour: Behaviour, arrived: float, total: int) -> AsyncIterator[tuple[int, int]]:
    """(tokens so far, new ones), each at its time."""
    has = 0
    while has < total:
        new = min(behaviour.chunk if has else behaviour.first_tokens, total - has)
        has += new
        await _until(arrived + behaviour.first_s + (has - behaviour.first_tokens) * behaviour.step_s)
        yield has, new


async def _until(deadline: float) -> None:
    """Absolute, so that late wake-ups do not add up."""
    await asyncio.sleep(max(0.0, deadline - asyncio.get_running_loop().time()))


def _json(value: Any) -> bytes:
    """Compact, as orjson and pydantic write it."""
    return json.dumps(value, separators=(",", ":")).encode()


def _sglang(behaviour: Behaviour, prompt: int, has: int, new: int, total: int) -> bytes:
    """Cumulative: every chunk repeats all ids and text so far; the text tries to look like counts."""
    reason = {"type": "length", "length": total} if has == total else None
    meta = {"id": "a1", "finish_reason": reason, "prompt_tokens": prompt, "weight_version": "default", "completion_tokens": has}
    text = {"text": '"completion_tokens":9 "finish_reason":null\n\n' * 2} if behaviour.text else {}
    return _json({**text, "output_ids": [17] * has, "meta_info": {**meta, "cached_tokens": behaviour.cached, "e2e_latency": None}})


def _openai(behaviour: Behaviour, prompt: int, has: int, new: int, total: int) -> bytes:
    reason = "length" if has == total else None
    choice = {"index": 0, "text": ' "completion_tokens":9' * new, "logprobs": None, "finish_reason": reason, "stop_reason": None}
    usage: dict[str, Any] = {"prompt_tokens": prompt, "total_tokens": prompt + has, "completion_tokens": has}
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "served-name"}
    return _json({**head, "choices": [choice], "usage": usage})


class FakeServer:
    """The fake server's process; a context manager.

    Attributes:
        url, second: the same server's two ports.
    """

    def __enter__(self) -> FakeServer:
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen([sys.executable, "-m", __name__], stdout=subprocess.PIPE, text=True, cwd=root)
        assert self.process.stdout
        self.url, self.second = (f"http://127.0.0.1:{port}" for port in self.process.stdout.readline().split())
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def behave(self, behaviour: Behaviour) -> None:
        """From now on."""
        call = urllib.request.Request(f"{self.url}/_behave", json.dumps(asdict(behaviour)).encode(), method="POST")
        urllib.request.urlopen(call, timeout=10).close()

    def log(self) -> list[dict[str, Any]]:
        """Requests since `behave`: path, whether their connection was open before, body."""
        with urllib.request.urlopen(f"{self.url}/_log", timeout=10) as response:
            return list(json.load(response))


async def _serve() -> None:
    server = _App()
    runner = web.AppRunner(server.app, access_log=None)
    await runner.setup()
    for _ in range(2):
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    ports = [address[1] for address in runner.addresses]
    server.second_port = ports[1]
    print(*ports, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    # asyncio's usual selector wakes up to a millisecond late; select() has microseconds.
    with contextlib.closing(asyncio.SelectorEventLoop(selectors.SelectSelector())) as loop:
        loop.run_until_complete(_serve())
