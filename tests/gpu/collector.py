"""Is a collector on a GPU, fed from a captured graph, the same as one on the CPU, and what does a step cost? PyTorch and Triton, no engine.

Run on a GPU host: python3 -m tests.gpu.collector
"""

from __future__ import annotations

import json
import logging
import time

import numpy as np
import torch

from softprune.checkpoint.families import ModelSpec
from softprune.runtime.collector import Collector, Span, file_of

LAYERS, EXPERTS, TOP_K, ROWS, GRAPH = 24, 32, 4, 8192, 64
SPEC = ModelSpec("GptOssForCausalLM", tuple(range(LAYERS)), EXPERTS, TOP_K)


def collector(device: str) -> Collector:
    """Of the 20B shape, 8 tags, started."""
    arguments = SPEC, "sha256:" + "a" * 64, TOP_K, None, 8, ROWS, torch.device(device), torch.bfloat16, "vLLM 0.32.0", logging.getLogger()
    made = Collector(*arguments)
    made.tag_number("chat")
    made.call("start", mode="router")
    return made


def compare(gpu: Collector, cpu: Collector) -> dict[str, bool]:
    """Random steps with padding, two switches of masks in between: equal counts, and gates to 1e-4 of a token."""
    source = torch.zeros(LAYERS, GRAPH, EXPERTS, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            gpu.record(layer, source[layer], source[layer])
    rng = np.random.default_rng(0)
    for step in range(60):
        rows, logits = int(rng.integers(1, 60)), torch.randn(LAYERS, GRAPH, EXPERTS).bfloat16()
        source.copy_(logits)
        graph.replay()
        for layer in range(LAYERS):
            cpu.record(layer, logits[layer], logits[layer])
        spans = [Span(int(rng.integers(2)), int(rng.integers(2)), 0, 1) for _ in range(rows)] if step % 3 else [Span(1, 10, 0, rows)]
        for one in (gpu, cpu):
            one.step(spans)
            if step in (20, 40):
                one.begin_epoch(None)
    found = [one.stats.copied().added(one._kept[None].sums).sums() for one in (gpu, cpu)]
    file_of(gpu.call("file"))  # holds every cross-check
    same = {name: bool(torch.equal(*(getattr(one, name) for one in found))) for name in ("count", "confidence", "coactivation")}
    return {**same, "gate_sum": bool(torch.allclose(found[0].gate_sum, found[1].gate_sum, atol=1e-4))}


def cost(gpu: Collector) -> dict[str, float]:
    """Microseconds of a step of 32 requests: on the host where the rows are those of the step before and where not, and on the GPU."""
    result, steps = {}, [[Span(tag, 0, 0, 1)] * 32 for tag in (0, 1)]
    for name, turns in (("host_same", 1), ("host_changed", 2)):
        for measured in (False, True):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for i in range(500):
                gpu.step(steps[i % turns])
            if measured:
                result[name] = (time.perf_counter() - began) * 2000
    for name, rows, times in (("gpu_32_rows", 32, 500), ("gpu_8192_rows", ROWS, 20)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if rows == ROWS:
            gpu.stats.describe(np.ones(ROWS, np.int32))
        gpu.stats.add(rows)
        begin.record()
        for _ in range(times):
            gpu.stats.add(rows)
        end.record()
        torch.cuda.synchronize()
        result[name] = begin.elapsed_time(end) * 1000 / times
    return {name: round(value, 2) for name, value in result.items()}


if __name__ == "__main__":
    one = collector("cuda")
    report = {
        "gpu": torch.cuda.get_device_name(),
        "device_MiB": round(one.stats.num_bytes / 2**20, 1),
        "same": compare(one, collector("cpu")),
    }
    print(json.dumps({**report, "step_us": cost(one)}, indent=1))
