"""How a run starts each engine: the command, and what it can say of its KV room and memory."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from softprune.bench.engine_metrics import memory_of
from softprune.bench.gpu.plan import Served
from softprune.bench.prompts import sglang_flags
from softprune.bench.server import Server, ServerError, free_port, vllm_command
from softprune.checkpoint.families import read_config

KEY = "bench-gpu"
MEMORY = ("weights_gib", "graphs_gib", "kv_gib", "kv_tokens")
"""What has to be known of a server to work out the KV room of a smaller card; `memory_of` may have more."""
ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class Launcher(ABC):
    """An engine on this machine.

    Attributes:
        name: of the engine's plan.
        package: the engine's Python package.
        stream: whether speeds are measured on streams, while all of them decode. vLLM compiles kernels for each new number of prefilled
            rows and loses a second or two there; elsewhere whole answers are asked for, which costs the server less.
        preset: the shape that it is measured with.
        token_ids: range of the prompts' token ids.
        metrics_args: further arguments, for servers whose preemptions are counted.
        tiles: what a server that started with a mask says that its kernels' tiles are chosen for.
    """

    name: str
    package: str
    stream: bool
    preset = "gpt-oss-20b"
    token_ids = (0, 480)
    metrics_args: tuple[str, ...] = ()
    tiles = "mask"

    def start(self, served: Served, work: Path, kv_tokens: int, max_batch: int, *more: str) -> Server:
        """A server process, not yet ready; softprune is in it if the plan says so, with the mask that it says."""
        port = free_port()
        env = {**ENV, **self.env(kv_tokens), **({} if served.is_patched else self.unpatched)}
        return Server(self.command_of(served, work, port, kv_tokens, max_batch, *more), port, work / f"{served.name}.log", KEY, env)

    def command_of(self, served: Served, work: Path, port: int, kv_tokens: int, max_batch: int, *more: str) -> list[str]:
        """Its command line."""
        command = self.command(work / served.model, port, kv_tokens, max_batch)
        if served.is_patched:
            command += ["--softprune-control"]
        if served.top_k is not None:
            command += ["--expert-top-k", str(served.top_k)]
        if served.mask is not None:
            command += ["--expert-mask", str(work / served.mask_file)]
        return [*command, *more]

    @property
    @abstractmethod
    def unpatched(self) -> dict[str, str]:
        """Environment variables that keep softprune out."""

    @abstractmethod
    def command(self, model: Path, port: int, kv_tokens: int, max_batch: int) -> list[str]:
        """The command line, but for softprune's flags."""

    def env(self, kv_tokens: int) -> dict[str, str]:
        """Further environment variables."""
        return {}

    @abstractmethod
    def check_room(self, server: Server, kv_tokens: int) -> None:
        """See that a server has the KV room that it was started with.

        Raises:
            ServerError: it took less, since memory was short.
        """

    @abstractmethod
    def memory(self, server: Server, model: Path) -> dict[str, Any]:
        """What a server's memory holds, by the names of `MEMORY`, as the engine reports it.

        True only of a server that booted alone: engines take it for the difference of what was free before and after.
        """


class Sglang(Launcher):
    name, package, stream = "sglang", "sglang", False
    # Streams show whether all requests run at once; a chunk for every token would cost the server a tenth.
    metrics_args = ("--enable-metrics", "--stream-interval", "32")

    @property
    def unpatched(self) -> dict[str, str]:
        return {"SGLANG_PLUGINS": "none"}

    def command(self, model: Path, port: int, kv_tokens: int, max_batch: int) -> list[str]:
        return [
            sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port),
            "--skip-tokenizer-init", "--dtype", "bfloat16", "--attention-backend", "fa3", "--mem-fraction-static", "0.85",
            "--max-total-tokens", str(kv_tokens), "--cuda-graph-max-bs", str(max_batch),
        ]  # fmt: skip

    def check_room(self, server: Server, kv_tokens: int) -> None:
        found = about(server).get("max_total_num_tokens")
        if found is None or found < 0.99 * kv_tokens:
            raise ServerError(f"{server.log.stem}: found KV room for {found} tokens; expected {kv_tokens}: too little memory is free")

    def memory(self, server: Server, model: Path) -> dict[str, Any]:
        found = memory_of(sglang_flags(about(server)), {})
        return {name: found[name] for name in MEMORY}


def about(server: Server) -> dict[str, Any]:
    """What SGLang says of itself."""
    status, found = server.request("GET", "/server_info")
    if status != 200:
        status, found = server.request("GET", "/get_server_info")
    return dict(found)


class Vllm(Launcher):
    name, package, stream = "vllm", "vllm", True
    kv_bytes = 24 * 2 * 8 * 64 * 2
    """Of a token, at most: 24 layers, keys and values, 8 heads of 64 numbers, BF16. Layers with a window need less of it."""
    max_model_len = 4096

    def check_room(self, server: Server, kv_tokens: int) -> None:
        """vLLM takes the room that it is given, or does not start."""

    def memory(self, server: Server, model: Path) -> dict[str, Any]:
        raise ServerError("vLLM does not say what its weights and graphs take; expected SGLang")

    @property
    def unpatched(self) -> dict[str, str]:
        return {"VLLM_PLUGINS": "none"}

    def command(self, model: Path, port: int, kv_tokens: int, max_batch: int) -> list[str]:
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size <= max_batch]
        return vllm_command(
            model, port, "--dtype", "bfloat16", "--max-model-len", str(self.max_model_len), "--max-num-batched-tokens", "8192",
            "--max-num-seqs", str(max_batch), "--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(kv_tokens * self.kv_bytes),
            # Those that are measured: vLLM's own list takes another minute to capture.
            "--compilation-config", json.dumps({"cudagraph_capture_sizes": sizes}),
        )  # fmt: skip


class VllmCpu(Vllm):
    """vLLM on this machine's CPU, with the small trained model: to try the scripts themselves."""

    preset, token_ids, max_model_len, block, tiles = "tiny", (100, 1000), 256, 32, "engine"

    def command(self, model: Path, port: int, kv_tokens: int, max_batch: int) -> list[str]:
        limits = ("--max-model-len", str(self.max_model_len), "--max-num-seqs", str(max_batch))
        room = ("--block-size", str(self.block), "--num-gpu-blocks-override", str(kv_tokens // self.block))
        return vllm_command(model, port, "--dtype", "bfloat16", "--enforce-eager", *limits, *room)

    def memory(self, server: Server, model: Path) -> dict[str, Any]:
        """Of the files and the shape: no engine reports it on a CPU."""
        config = read_config(model)
        token = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2 * 2
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        return {"weights_gib": weights / 2**30, "graphs_gib": 0.0, "kv_gib": 1024 * token / 2**30, "kv_tokens": 1024}

    def env(self, kv_tokens: int) -> dict[str, str]:
        return {"VLLM_CPU_KVCACHE_SPACE": "1"}


LAUNCHERS: dict[str, type[Launcher]] = {"sglang": Sglang, "vllm": Vllm}
