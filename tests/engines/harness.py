"""Starting real vLLM servers, switching their masks, and running models offline, each with a bound on time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprune.bench.server import Server, free_port, vllm_command
from softprune.mask import ExpertMask
from tests.conftest import random_mask, saved

HERE = Path(__file__).parent
KEY = "test-key"
API = "/softprune/v1"
BASE_ENV = {
    "PYTHONPATH": str(HERE / "plugins"), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}  # fmt: skip
SERVER_ARGS = ["--max-model-len", "2048", "--dtype", "bfloat16"]


class VllmServer(Server):
    """vLLM on this machine's CPU, eager."""

    def __init__(self, model: Path, *args: str, log: Path, env: dict[str, str] | None = None) -> None:
        self.model = str(model)
        port = free_port()
        super().__init__(vllm_command(model, port, *SERVER_ARGS, "--enforce-eager", *args), port, log, KEY, {**BASE_ENV, **(env or {})})

    def wait_exit(self, seconds: float = 300) -> str:
        """Wait for the server to give up; its output. Fails if it comes up."""
        deadline = time.monotonic() + seconds
        started = False
        while self.process.poll() is None and not started and time.monotonic() < deadline:
            time.sleep(0.3)
            started = "Application startup complete" in self.text()
        code = self.process.poll()
        self.stop()
        assert not started, "the server started, although it should have refused"
        assert code not in (None, 0), f"exit status {code}:\n{self.text()[-3000:]}"
        return self.text()

    def complete(self, prompt: list[int], max_tokens: int, **options: Any) -> Any:
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **options}
        status, answer = self.request("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer

    def get_text(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return str(response.read().decode())

    def metric(self, name: str) -> float:
        """A metric's value, summed over its labels."""
        lines = [line for line in self.get_text("/metrics").splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def stream(self, prompt: list[int], max_tokens: int, on_chunk: Callable[[int], None] = lambda count: None, **options: Any) -> Stream:
        """Stream one answer; `on_chunk` is told how many tokens have come."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        data = json.dumps({**body, "return_token_ids": True, **options}).encode()
        call = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", data, {"content-type": "application/json"})
        tokens: list[int] = []
        last: dict[str, Any] = {}
        done = False
        with urllib.request.urlopen(call, timeout=300) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    last = json.loads(line[len(b"data: ") :])
                    tokens += last["choices"][0]["token_ids"]
                    on_chunk(len(tokens))
                done = done or line.startswith(b"data: [DONE]")
        assert done, f"the stream broke off: {last}"
        return Stream(last["id"], tokens, last.get("softprune", {}).get("epochs", []))


@dataclass(frozen=True)
class Stream:
    """One streamed answer, whole."""

    id: str
    tokens: list[int]
    epochs: list[int]


Starts = dict[str, tuple[dict[str, str], str]]
"""Servers that have to refuse to start, by name: environment variables ("MASK" stands for the mask file), and what the output says."""


def outputs_of(starts: Starts, model: Path, folder: Path) -> dict[str, str]:
    """Output of real servers that were started with a mask and something missing; two at a time."""

    def start(name: str) -> str:
        place = folder / name.replace(" ", "_")
        place.mkdir()
        path = saved(random_mask(model, 24), place / "mask.json")
        env = {key: path if value == "MASK" else value for key, value in starts[name][0].items()}
        server = VllmServer(model, "--expert-mask", path, log=place / "log.txt", env=env)
        try:
            return server.wait_exit()
        except AssertionError as error:
            return f"AssertionError: {error}"

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(starts, pool.map(start, starts), strict=True))


def check_refused(starts: Starts, outputs: dict[str, str], name: str) -> None:
    """A server gave up, and said why."""
    assert not outputs[name].startswith("AssertionError"), outputs[name]
    assert starts[name][1] in outputs[name], outputs[name][-3000:]


def run_offline(jobs: list[dict[str, Any]], folder: Path, env: dict[str, str] | None = None, timeout: float = 500) -> dict[str, Any]:
    """Run jobs of offline.py in one process; results by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with open(folder / "log.txt", "wb") as log:
        code = subprocess.run(
            [sys.executable, str(HERE / "offline.py"), "jobs.json", "results.json"],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT, timeout=timeout, env={**os.environ, **BASE_ENV, **(env or {})},
        ).returncode  # fmt: skip
    text = (folder / "log.txt").read_text(errors="replace")
    assert code == 0, text[-5000:]
    results = {result["name"]: result for result in json.loads((folder / "results.json").read_text())}
    failed = {name: result["error"] for name, result in results.items() if "error" in result}
    assert not failed, f"{failed}\n{text[-5000:]}"
    return results


@dataclass
class Live:
    """A server that was started without a mask, and three masks for it."""

    server: VllmServer
    masks: list[ExpertMask]

    def put(self, mask: ExpertMask | None, query: str = "") -> dict[str, Any]:
        status, body = self.try_put(mask, query)
        assert status == 200, body
        return body

    def try_put(self, mask: ExpertMask | None, query: str = "") -> tuple[int, Any]:
        method = "DELETE" if mask is None else "PUT"
        return self.server.request(method, API + "/mask" + query, None if mask is None else json.loads(mask.dump()))

    def status(self) -> dict[str, Any]:
        status, body = self.server.request("GET", API + "/status")
        assert status == 200, body
        return body

    def first_token(self, prompt: list[int], **options: Any) -> tuple[dict[str, float], int]:
        """Top-20 log-probabilities of the first token that is generated, and how many tokens of the prompt were cached."""
        answer = self.server.complete(prompt, 1, logprobs=20, return_tokens_as_token_ids=True, **options)
        return answer["choices"][0]["logprobs"]["top_logprobs"][0], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def scores(server: VllmServer, prompts: list[list[int]]) -> list[Any]:
    """Log-probabilities of every token, prompt and answer."""
    answers = [server.complete(prompt, 4, prompt_logprobs=0, logprobs=0) for prompt in prompts]
    return [(answer["choices"][0]["prompt_logprobs"], answer["choices"][0]["logprobs"]["token_logprobs"]) for answer in answers]
