"""What an engine's own Prometheus metrics say of its running requests: the same few facts, whichever engine it is.

Names are those of vLLM 0.26 to 0.33 and SGLang 0.5.16 to 0.5.23 (`tests/contract` looks them up in the newest).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprune.bench.client import DecodeClient
from softprune.bench.errors import BenchmarkError
from softprune.bench.graph_memory import graphs_gib

PATH = "/metrics"


@dataclass(frozen=True)
class Names:
    """What an engine calls them.

    Attributes:
        running, waiting: gauges; requests in steps, and in the queue.
        preempted: counter of requests that had to give up their KV while they ran.
        witness: a metric that is there as soon as the counter could be; a counter without a value yet is not shown by SGLang.
    """

    running: str
    waiting: str
    preempted: str
    witness: str


NAMES = {
    "vLLM": Names("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:num_preemptions_total", "vllm:num_preemptions_total"),
    "SGLang": Names("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:num_retracted_requests_total", "sglang:num_retracted_reqs"),
}
CACHE_CONFIG = "vllm:cache_config_info"
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')

Metrics = Mapping[str, list[tuple[dict[str, str], float]]]
"""Name -> (labels, value) of each series."""


@dataclass(frozen=True)
class Load:
    """Requests that run and wait now, and preemptions since the start."""

    running: int
    waiting: int
    preempted: int


def parse(text: str) -> Metrics:
    """Samples of the Prometheus text format, without histograms' meaning or timestamps."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            name, labels, value = match.groups()
            found.setdefault(name, []).append((dict(_LABEL.findall(labels or "")), float(value)))
    return found


def load_of(metrics: Metrics, engine: str | None) -> Load:
    """An engine's load.

    Args:
        metrics: as parsed.
        engine: "vLLM" or "SGLang".

    Raises:
        BenchmarkError: another engine, or one whose metrics do not tell.
    """
    if engine not in NAMES:
        raise BenchmarkError(None, None, None, f"the engine {engine}", f"one whose metrics are known: {', '.join(NAMES)}")
    names = NAMES[engine]
    for name in (names.running, names.waiting, names.witness):
        if name not in metrics:
            hint = ", which SGLang has with --enable-metrics" if engine == "SGLang" else ""
            raise BenchmarkError(None, None, None, f"no {name} at {PATH}", f"the engine's metrics{hint}")
    return Load(*(int(_total(metrics, name)) for name in (names.running, names.waiting, names.preempted)))


async def read(client: DecodeClient) -> Metrics:
    """A server's metrics now; raises `BenchmarkError` if it has none."""
    status, text = await client.text(PATH)
    if status != 200:
        hint = "; start SGLang with --enable-metrics" if client.engine["name"] == "SGLang" else ""
        raise BenchmarkError(None, None, None, f"HTTP {status} at {PATH}", f"the engine's metrics{hint}")
    return parse(text)


def memory_of(flags: Mapping[str, Any], metrics: Metrics) -> dict[str, float | int | None]:
    """What the engine says of its memory; what it does not tell is None.

    Args:
        flags: of `DecodeClient`; SGLang's hold its own account, in GB as it counts them (2^30 bytes).
        metrics: vLLM's hold its KV blocks.
    """
    own = flags.get("memory_usage") or {}
    config = metrics[CACHE_CONFIG][0][0] if metrics.get(CACHE_CONFIG) else {}
    blocks, size = (_whole(config.get(name)) for name in ("num_gpu_blocks", "block_size"))
    tokens = own.get("token_capacity", blocks * size if blocks and size else None)
    return {
        "weights_gib": own.get("weight"), "kv_gib": own.get("kvcache"),
        "graphs_gib": graphs_gib(own.get("graph")),
        "kv_tokens": tokens, "kv_blocks": blocks, "block_size": size,
    }  # fmt: skip


def _total(metrics: Metrics, name: str) -> float:
    """Over all series, but for those by priority, whose sum is a series of its own."""
    return sum(value for labels, value in metrics.get(name, []) if not labels.get("priority"))


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
