"""SGLang's real parser takes every command line of the GPU benchmark, and understands it as it was meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sglang.srt.server_args import prepare_server_args

from softprune.bench.gpu.headroom import VARIANTS, Shape
from softprune.bench.gpu.launchers import Sglang
from softprune.bench.gpu.plan import Served, sglang

SERVERS = [(served, phase.kv_tokens, phase.max_batch, ()) for phase in sglang() for served in phase.servers]
SERVERS += [(served, 24_000, Shape().graphs, Sglang.metrics_args) for served in VARIANTS.values()]


@pytest.mark.parametrize(("served", "kv_tokens", "max_batch", "more"), SERVERS)
def test_commands(models: dict[str, Path], tmp_path: Path, served: Served, kv_tokens: int, max_batch: int, more: tuple[str, ...]) -> None:
    (tmp_path / served.model).symlink_to(models["gpt-oss"])
    command = Sglang().command_of(served, tmp_path, 30_000, kv_tokens, max_batch, *more)
    begin = command.index("sglang.launch_server") + 1
    # What this machine has instead of the GPU's; the last of two is taken.
    args = prepare_server_args([*command[begin:], "--device", "cpu", "--attention-backend", "intel_amx"])
    assert (args.model_path, args.port, args.max_total_tokens) == (str(tmp_path / served.model), 30_000, kv_tokens)
    assert args.cuda_graph_max_bs_decode == max_batch
    assert args.enable_metrics == bool(more)
    assert args.stream_interval == (32 if more else 1)
    overrides = json.loads(args.json_model_override_args)
    assert ("softprune" in overrides) == served.is_patched
    assert overrides.get("num_experts_per_tok") == served.top_k
