"""What the device's collector added up becomes a file whose every cross-check holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from softprune.runtime.router_stats import CONFIDENCE_BINS, RouterStats, RouterSums
from softprune.stats.collected import router_tensors
from softprune.stats.file import Statistics, read, write
from softprune.stats.header import Tokens
from softprune.stats.merge import merge
from softprune.stats.summary import complete, describe
from tests.unit.stats_of import MODEL, header

TAGS = ("default", "code")


def collect(seed: int, steps: int, run: str) -> tuple[Statistics, RouterSums]:
    """Steps of random logits; the last rows of each are padding."""
    generator = torch.Generator().manual_seed(seed)
    stats = RouterStats(MODEL.num_layers, MODEL.num_experts, MODEL.top_k, len(TAGS), 32, "cpu", torch.bfloat16)
    tokens = np.zeros((len(TAGS), 2), int)
    for _ in range(steps):
        rows = int(torch.randint(1, 30, (1,), generator=generator))
        stats.slab.copy_(torch.randn(stats.slab.shape, generator=generator))
        stats.cells.copy_(torch.randint(0, 2 * len(TAGS), (32,), generator=generator))
        stats.num_rows.fill_(rows)
        stats.add(32)
        np.add.at(tokens.reshape(-1), stats.cells[:rows].numpy(), 1)
    sums = stats.read()
    counted = {tag: Tokens(prefill=int(tokens[i, 0]), decode=int(tokens[i, 1]), cached=0) for i, tag in enumerate(TAGS)}
    head = header(run, TAGS, ("router",), counted, confidence_bins=CONFIDENCE_BINS)
    return Statistics.of(head, router_tensors(sums), run), sums


def test_the_collectors_sums_make_a_file(tmp_path: Path) -> None:
    statistics, sums = collect(0, 20, "run-1")
    write(statistics, tmp_path / "s")
    back = read(tmp_path / "s")
    assert complete(back) is True
    tokens = [back.header.tokens[tag] for tag in TAGS]
    assert np.allclose(back["router.gate_sum"].sum(-1), [[[each.prefill] * 3, [each.decode] * 3] for each in tokens], atol=1e-4)
    assert np.array_equal(back["router.confidence"].sum(-1) * MODEL.top_k, back["router.count"].sum(-1))
    pairs = back["router.coactivation"]
    assert np.array_equal(pairs + np.swapaxes(np.triu(pairs, 1), -1, -2), sums.coactivation.numpy())
    assert describe(back)["layers"][0]["used"] == MODEL.num_experts


def test_two_servers_add_up_to_one() -> None:
    parts = [collect(seed, 5, f"run-{seed}") for seed in range(3)]
    total = merge([statistics for statistics, _ in parts])
    assert complete(total) is True
    assert np.array_equal(total["router.count"][0], sum(sums.count.numpy()[0] for _, sums in parts))
