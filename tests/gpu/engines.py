"""How each engine is started for the proof, by the commands that users type, and asked for log-probabilities."""

from __future__ import annotations

import json
import os
import platform
import sys
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from softprune.bench.server import Server

PLUGINS = Path(__file__).parent.parent / "engines" / "plugins"
STAND_INS = Path(__file__).parent.parent / "engines" / "stand_ins"
ROUTES = "/softprune/v1/routes?trace=1"
Answer = tuple[list[int], list[float]]
"""Generated ids, and the log-probabilities of the prompt's tokens (but the first) and of the generated ones."""


@dataclass(frozen=True)
class Row:
    """One server.

    Attributes:
        name: of the row in the results.
        model: folder in the working folder.
        mask: name of a mask, or None.
        args: further command line arguments.
        patched: False keeps softprune out of the process altogether.
        probe: count and trace what is selected; eager only.
        graphs: run with CUDA graphs, as users do.
        command: which of the engine's commands starts it.
        batched: also send the first prompts in batches of 32.
        collect: how the test plugin is to collect router statistics; "" for not at all.
    """

    name: str
    model: str = "base"
    mask: str | None = None
    args: tuple[str, ...] = ()
    patched: bool = True
    probe: bool = False
    graphs: bool = False
    command: int = 0
    batched: bool = False
    collect: str = ""


class Engine(ABC):
    """An engine on this machine.

    Attributes:
        name: as `prove.py` takes it.
        cached_args: further arguments under which answers say how much of their prompt was cached.
        commands: those that start a server.
        trial: MoE backends to be treated as proven, to find out whether they are.
        backend_flag: chooses one.
        streams: measure speed from the last stream's first token on. vLLM compiles kernels for each new number of prefilled
            rows, and loses a second or two there; elsewhere whole answers are asked for, which costs the server less.
    """

    name: str
    streams = False
    cached_args: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...]
    trial: str
    backend_flag: str

    def __init__(self, on_gpu: bool, python: str = sys.executable) -> None:
        self.on_gpu, self.python = on_gpu, python

    def start(self, row: Row, work: Path, masks: dict[str, str], port: int, env: Mapping[str, str] | None = None) -> Server:
        """A server process for a row; not yet ready."""
        args = [*self.base_args(row, work / row.model, port), *row.args]
        if row.mask:
            args += ["--expert-mask", masks[row.mask]]
        if row.probe:
            args += ["--softprune-debug-routes"]
        path = [str(PLUGINS)] if row.patched or not self.on_gpu else []
        if self.name == "sglang" and not self.on_gpu:
            path.append(str(STAND_INS))
        shared = {
            "PYTHONPATH": ":".join([*path, os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1", "SOFTPRUNE_TEST_PROVEN": self.trial,
        }  # fmt: skip
        command = [*self.commands[row.command % len(self.commands)], *args]
        if row.collect:
            shared["SOFTPRUNE_TEST_COLLECT"] = row.collect
        return Server(command, port, work / f"{row.name}.log", "proof", {**shared, **self.env(row), **(env or {})})

    @abstractmethod
    def base_args(self, row: Row, model: Path, port: int) -> list[str]:
        """What the command line has for every server of a row's kind."""

    @abstractmethod
    def env(self, row: Row) -> dict[str, str]:
        """Environment variables of the engine's own."""

    @abstractmethod
    def ask(self, server: Server, prompts: Sequence[list[int]], max_tokens: int) -> list[Answer]:
        """Send prompts as one request; greedy, forced length."""

    @abstractmethod
    def generate(self, server: Server, prompt: list[int], max_tokens: int, stream: bool = False) -> dict[str, Any]:
        """One answer of forced length: {"tokens", "epochs"}."""

    @abstractmethod
    def first_token(self, server: Server, prompt: list[int], salt: str | None = None) -> tuple[dict[int, float], int]:
        """Top-20 log-probabilities of the first token generated, by id, and how much of the prompt (under a salt) was cached."""

    def examine(self, row: Row, server: Server, prompts: Sequence[list[int]], batch: int, max_tokens: int) -> dict[str, Any]:
        """What a server answers to prompts in batches of this size, and what its routers selected meanwhile."""
        if row.probe:
            server.request("DELETE", ROUTES)
        answers = [one for start in range(0, len(prompts), batch) for one in self.ask(server, prompts[start : start + batch], max_tokens)]
        result: dict[str, Any] = {"tokens": [ids for ids, _ in answers], "logprobs": [scores for _, scores in answers]}
        # A request's last token is sampled but never computed on.
        result["sent"] = sum(len(prompt) + max_tokens - 1 for prompt in prompts)
        if row.patched:
            result["status"] = server.request("GET", "/softprune/v1/status")[1]
        if row.probe:
            result["routes"] = server.request("GET", ROUTES)[1]
        return result


class Sglang(Engine):
    name = "sglang"
    backend_flag = "--moe-runner-backend"
    trial = "mxfp4/triton_kernel,mxfp4/marlin,mxfp4/flashinfer_mxfp4,mxfp4/triton,bf16/triton"

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:  # type: ignore[override]
        module = (self.python, "-m", "sglang.launch_server")
        return (module, ("sglang", "serve")) if self.on_gpu else (module,)

    def base_args(self, row: Row, model: Path, port: int) -> list[str]:
        args = ["--model-path", str(model), "--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init", "--dtype", "bfloat16"]
        args += ["--max-total-tokens", "120000" if self.on_gpu else "16384"]
        if self.on_gpu:
            args += ["--attention-backend", "fa3", "--mem-fraction-static", "0.85", "--cuda-graph-max-bs", "64"]
        else:
            attention = "torch_native" if row.model == "qwen" else "intel_amx"
            args += ["--device", "cpu", "--attention-backend", attention, "--mem-fraction-static", "0.5", "--sampling-backend", "pytorch"]
            args += ["--disable-hybrid-swa-memory", "--grammar-backend", "none", "--moe-runner-backend", "triton"]
        return args if row.graphs and self.on_gpu else [*args, "--disable-cuda-graph", "--disable-radix-cache"]

    def env(self, row: Row) -> dict[str, str]:
        # One thread: several servers share few cores, and PyTorch's threads wait for each other by spinning.
        env = {} if self.on_gpu else {"SOFTPRUNE_TEST_CPU_ATTENTION": "1", "OMP_NUM_THREADS": "1"}
        return env if row.patched else {**env, "SGLANG_PLUGINS": "none" if self.on_gpu else "aaa_softprune_test"}

    def ask(self, server: Server, prompts: Sequence[list[int]], max_tokens: int) -> list[Answer]:
        sampling = {"max_new_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": list(prompts), "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        status, answers = server.request("POST", "/generate", body)
        assert status == 200, answers
        return [(one["output_ids"], _firsts(one["meta_info"])) for one in answers]

    def generate(self, server: Server, prompt: list[int], max_tokens: int, stream: bool = False) -> dict[str, Any]:
        sampling = {"max_new_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        answer = _last(server, "/generate", {"input_ids": prompt, "sampling_params": sampling, "stream": stream})[-1]
        return {"tokens": answer["output_ids"], "epochs": answer["meta_info"].get("softprune", {}).get("epochs", [])}

    def first_token(self, server: Server, prompt: list[int], salt: str | None = None) -> tuple[dict[int, float], int]:
        sampling = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 20, "extra_key": salt}
        meta = _last(server, "/generate", body)[-1]["meta_info"]
        return {token: score for score, token, *_ in meta["output_top_logprobs"][0]}, meta["cached_tokens"]


def _last(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    """A call's answer; of a stream, every chunk's."""
    data = json.dumps(body).encode()
    call = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(call, timeout=300) as response:
        if not body.get("stream"):
            return [json.loads(response.read())]
        lines = [line for line in response if line.startswith(b"data: ")]
    assert lines[-1].startswith(b"data: [DONE]"), "the stream broke off"
    return [json.loads(line[len(b"data: ") :]) for line in lines[:-1]]


def _firsts(meta: dict[str, Any]) -> list[float]:
    return [entry[0] for entry in [*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"]]]


class Vllm(Engine):
    name = "vllm"
    streams = True
    cached_args = ("--enable-prompt-tokens-details",)
    backend_flag = "--moe-backend"
    trial = "mxfp4/TRITON,mxfp4/MARLIN,mxfp4/TRITON_UNFUSED,mxfp4/FLASHINFER_CUTLASS_MXFP4_BF16,unquantized/TRITON"

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:  # type: ignore[override]
        # CPU builds of vLLM have no working `vllm serve`.
        return (("vllm", "serve"),) if self.on_gpu else ((self.python, "-m", "vllm.entrypoints.openai.api_server", "--model"),)

    def base_args(self, row: Row, model: Path, port: int) -> list[str]:
        args = [str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        args += ["--served-model-name", "model", "--max-model-len", "4096", "--max-num-batched-tokens", "8192"]
        if self.on_gpu:
            args += ["--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(6 << 30), "--max-num-seqs", "64"]
            # Those that are measured: vLLM's own list takes another minute to capture.
            args += ["--compilation-config", '{"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}'] if row.graphs else []
        return args if row.graphs else [*args, "--enforce-eager", "--no-enable-prefix-caching"]

    def env(self, row: Row) -> dict[str, str]:
        env = {} if self.on_gpu else {"VLLM_CPU_KVCACHE_SPACE": "1"}
        return env if row.patched else {**env, "VLLM_PLUGINS": "none"}

    def ask(self, server: Server, prompts: Sequence[list[int]], max_tokens: int) -> list[Answer]:
        body = {
            "model": "model", "prompt": list(prompts), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "prompt_logprobs": 0, "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        status, answer = server.request("POST", "/v1/completions", body)
        assert status == 200, answer
        return [_choice(choice, prompt) for choice, prompt in zip(answer["choices"], prompts, strict=True)]

    def generate(self, server: Server, prompt: list[int], max_tokens: int, stream: bool = False) -> dict[str, Any]:
        body = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        chunks = _last(server, "/v1/completions", {**body, "return_token_ids": True, "stream": stream})
        tokens = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
        return {"tokens": tokens, "epochs": chunks[-1].get("softprune", {}).get("epochs", [])}

    def first_token(self, server: Server, prompt: list[int], salt: str | None = None) -> tuple[dict[int, float], int]:
        body = {"model": "model", "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20, "return_tokens_as_token_ids": True}
        (answer,) = _last(server, "/v1/completions", {**body, **({"cache_salt": salt} if salt else {})})
        scores = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return {int(token.removeprefix("token_id:")): score for token, score in scores.items()}, cached


def _choice(choice: dict[str, Any], prompt: list[int]) -> Answer:
    scored = [entry[str(token)]["logprob"] for entry, token in zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)]
    return choice["token_ids"], [*scored, *choice["logprobs"]["token_logprobs"]]


ENGINES = {"sglang": Sglang, "vllm": Vllm}


def versions(engine: Engine) -> dict[str, Any]:
    """Of what a result was made with."""
    import torch

    names = ("softprune", "torch", "transformers", "sglang" if engine.name == "sglang" else "vllm" if engine.on_gpu else "vllm-cpu")
    return {
        "versions": {name: version(name) for name in names}, "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if engine.on_gpu else None,
    }  # fmt: skip
