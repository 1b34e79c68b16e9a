"""Starting real SGLang servers on the CPU, talking to them, and switching their masks."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprune.bench.server import Server, free_port
from softprune.mask import ExpertMask
from tests.conftest import prompts_for, random_mask, saved
from tests.engines.harness import API, Starts
from tests.gpu import compare
from tests.gpu.engines import Row, Sglang

HERE = Path(__file__).parent
INSIDE = HERE / "inside_sglang"
PYTHON = HERE.parent.parent / ".venv-sglang" / "bin" / "python"
SGLANG = Sglang(on_gpu=False, python=str(PYTHON))
CHUNK = 64
"""Tokens of a prefill that are computed in one step. Prompts are multiples of it: then the same steps are taken with and without a hit."""
TOP = 20
MAX_TOKENS = 4


def prompts(model: str) -> list[list[int]]:
    """Over 10,000 tokens for one of the tests' models."""
    return prompts_for(model, 80, 128, seed=41)


def start(model: Path, log: Path, *args: str, env: dict[str, str] | None = None) -> Server:
    """A server with its prefix cache on; not yet ready."""
    port = free_port()
    command = [
        str(PYTHON), "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "bfloat16", "--max-total-tokens", "16384", "--device", "cpu", "--attention-backend", "intel_amx",
        "--mem-fraction-static", "0.5", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--moe-runner-backend", "triton",
        "--disable-hybrid-swa-memory", "--disable-cuda-graph", "--chunked-prefill-size", str(CHUNK), *args,
    ]  # fmt: skip
    path = os.pathsep.join([*(str(HERE / folder) for folder in ("plugins", "stand_ins")), os.environ.get("PYTHONPATH", "")])
    common = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "SOFTPRUNE_TEST_CPU_ATTENTION": "1", "OMP_NUM_THREADS": "1"}
    return Server(command, port, log, "proof", {**common, **(env or {})})


@dataclass
class Client:
    """Talks to one server."""

    server: Server

    def switch(self, mask: ExpertMask | None, in_flight: str = "continue") -> int:
        """Put a mask in force, or none; the new epoch."""
        method, body = ("DELETE", None) if mask is None else ("PUT", json.loads(mask.dump()))
        status, answer = self.server.request(method, f"{API}/mask?in_flight={in_flight}", body)
        assert status == 200, answer
        assert (answer["mask"] or {}).get("hash") == (mask.hash if mask else None)
        return int(answer["epoch"])

    def status(self) -> dict[str, Any]:
        status, answer = self.server.request("GET", f"{API}/status")
        assert status == 200, answer
        return answer

    def wait_begun(self, request_id: str) -> None:
        """Wait until a first step with this request has been launched."""
        deadline = time.monotonic() + 30
        while self.server.request("GET", f"{API}/requests/{request_id}")[0] != 200:
            assert time.monotonic() < deadline, f"{request_id} did not begin"
            time.sleep(0.01)

    def stream(self, ids: list[int], tokens: int, seen: Callable[[int], None] = lambda count: None, **more: Any) -> dict[str, Any]:
        """Generate; `seen` is called with the number of tokens so far. The last chunk."""
        body = json.dumps({**generation(ids, tokens), "stream": True, **more}).encode()
        call = urllib.request.Request(
            f"http://127.0.0.1:{self.server.port}/generate", data=body, headers={"content-type": "application/json"}, method="POST"
        )
        last: dict[str, Any] = {}
        with urllib.request.urlopen(call, timeout=120) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    last = json.loads(line[6:])
                    seen(last["meta_info"]["completion_tokens"])
        return last

    def ask(self, ids: list[int], tokens: int = 1, **more: Any) -> dict[str, Any]:
        status, answer = self.server.request("POST", "/generate", {**generation(ids, tokens), **more})
        assert status == 200, answer
        return answer

    def next_token(self, ids: list[int], **more: Any) -> tuple[dict[int, float], int]:
        """Log-probabilities of the TOP likeliest next tokens, and how many tokens were found in the cache."""
        meta = self.ask(ids, return_logprob=True, top_logprobs_num=TOP, **more)["meta_info"]
        return {token: score for score, token, _ in meta["output_top_logprobs"][0]}, meta["cached_tokens"]

    def scores(self, prompts: list[list[int]]) -> list[Any]:
        """Everything that is computed of some prompts; past the prefix cache, since log-probabilities of prompts are asked for."""
        answers = [self.ask(ids, 4, return_logprob=True, logprob_start_len=0) for ids in prompts]
        return [(one["output_ids"], one["meta_info"]["input_token_logprobs"], one["meta_info"]["output_token_logprobs"]) for one in answers]


def generation(ids: list[int], tokens: int) -> dict[str, Any]:
    return {"input_ids": ids, "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}}


def epochs(answer: dict[str, Any]) -> list[int]:
    return answer["meta_info"]["softprune"]["epochs"]


def difference(one: dict[int, float], other: dict[int, float]) -> float:
    """Largest difference between log-probabilities of the tokens that both name; 99 if they name no common ones."""
    return max((abs(one[token] - other[token]) for token in set(one) & set(other)), default=99.0)


class Pause:
    """Lets a test go on once a stream has so many tokens."""

    def __init__(self) -> None:
        self._count, self._changed = 0, threading.Condition()

    def __call__(self, count: int) -> None:
        with self._changed:
            self._count = count
            self._changed.notify_all()

    def until(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, 60), f"{self._count} tokens"


def mixed_then_asked(client: Client, masks: dict[str, ExpertMask], prompt: list[int]) -> dict[str, Any]:
    """A generation under A, B and A again; then its text is sent as a prompt, once through the prefix cache and once past it."""
    client.switch(masks["A"])
    pause = Pause()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(client.stream, prompt, 5 * CHUNK, pause)
        pause.until(CHUNK)
        client.switch(masks["B"])
        pause.until(3 * CHUNK)
        client.switch(masks["A"])
        answer = run.result()
    ids = [*prompt, *answer["output_ids"]]
    cached, hit = client.next_token(ids)
    fresh, none = client.next_token(ids, extra_key="past the cache")
    assert none == 0
    return {"epochs": len(epochs(answer)), "hit": hit, "difference": difference(cached, fresh), "common": len(set(cached) & set(fresh))}


def wait_exit(server: Server, seconds: float = 300) -> str:
    """Wait for the server to give up; its output, or what it did instead."""
    deadline = time.monotonic() + seconds
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.3)
        if "Uvicorn running" in server.text():
            server.stop(grace=0)
            return "the server started, although it should have refused"
    ended = server.process.poll()
    server.stop(grace=0)
    return server.text() if ended not in (None, 0) else f"exit status {ended}\n{server.text()[-3000:]}"


def outputs_of(starts: Starts, work: Path) -> dict[str, str]:
    """Output of servers of a folder's gpt-oss that were started with a mask and something missing; two at a time."""

    def start(name: str) -> str:
        path = saved(random_mask(work / "gpt-oss", 24), work / f"{name} mask.json")
        env = {key: path if value == "MASK" else value for key, value in starts[name][0].items()}
        return wait_exit(SGLANG.start(Row(name, "gpt-oss", "mask"), work, {"mask": path}, free_port(), env))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(starts, pool.map(start, starts), strict=True))


def inside(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run SGLang's own Python; options of this pytest run are not for one inside it."""
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return subprocess.run([PYTHON, *arguments], capture_output=True, text=True, timeout=300, env={**own, **env}, check=False)


def run_tests_inside(tests: str, env: dict[str, str], *options: str) -> None:
    """Run test files of inside_sglang there; none may fail or be skipped."""
    run = inside("-m", "pytest", "-q", *options, *[str(INSIDE / name) for name in tests.split()], env=env)
    print(run.stdout[-3000:])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "passed" in run.stdout
    assert "skipped" not in run.stdout


def check_routes(run: dict[str, Any], mask: ExpertMask, top_k: int) -> dict[str, Any]:
    """Over 10,000 tokens, every selection accounted for, layer by layer, and none of a pruned expert; the figures."""
    routes, found = run["routes"], compare.routes(run, mask, top_k)
    assert found["pruned"] == 0
    assert found["tokens"] >= run["sent"] > 10_000  # SGLang's overlapped scheduler may compute a token past the last
    assert len(set(routes["tokens"])) == 1
    assert [sum(counts) for counts in routes["counts"]] == [found["tokens"] * top_k] * 4
    assert run["status"]["mask"] == {"hash": mask.hash, "num_kept": mask.num_kept}
    assert run["status"]["top_k"] == top_k
    return found
