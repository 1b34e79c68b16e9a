"""Adding up what routers chose, in PyTorch: against plain loops, with padding, tags, phases, masks and ties."""

from __future__ import annotations

import math

import pytest
import torch

from softprune.runtime.router_stats import CONFIDENCE_BINS, RouterStats, top_k_gates

LAYERS, EXPERTS, TOP_K, TAGS, ROWS = 3, 16, 4, 2, 50


def filled(seed: int, dtype: torch.dtype = torch.bfloat16) -> RouterStats:
    """A step of 40 rows and 10 of padding; rows of two tags in both phases, and some that don't count."""
    generator = torch.Generator().manual_seed(seed)
    stats = RouterStats(LAYERS, EXPERTS, TOP_K, TAGS, ROWS, "cpu", dtype)
    stats.slab.copy_((torch.randn(LAYERS, ROWS, EXPERTS, generator=generator) * 4).round() / 2 + 0.0)
    stats.slab[1, :, 5:9] = -torch.inf
    stats.cells.copy_(torch.randint(-1, 2 * TAGS, (ROWS,), generator=generator))
    stats.num_rows.fill_(40)
    return stats


def test_against_loops() -> None:
    stats = filled(1)
    stats.add(ROWS)
    found = stats.read()
    count, gate_sum = torch.zeros_like(found.count), torch.zeros_like(found.gate_sum)
    confidence, pairs = torch.zeros_like(found.confidence), torch.zeros_like(found.coactivation)
    for layer in range(LAYERS):
        for row in range(40):
            cell = int(stats.cells[row])
            if cell < 0:
                continue
            tag, phase = divmod(cell, 2)
            logits = stats.slab[layer, row].tolist()
            ids = sorted(range(EXPERTS), key=lambda i: (-logits[i], i))[:TOP_K]
            total = sum(math.exp(logits[i]) for i in ids)
            gates = {i: math.exp(logits[i]) / total for i in ids}
            for i in ids:
                count[tag, phase, layer, i] += 1
                gate_sum[tag, phase, layer, i] += gates[i]
                for j in ids:
                    pairs[tag, layer, i, j] += 1
            confidence[tag, phase, layer, min(int(max(gates.values()) * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)] += 1
    assert torch.equal(found.count, count)
    assert torch.equal(found.coactivation, pairs)
    assert torch.equal(found.confidence, confidence)
    assert torch.allclose(found.gate_sum, gate_sum, atol=1e-5)
    assert not found.count[:, :, 1, 5:9].any()
    assert torch.equal(found.count.sum((0, 1, 3)), TOP_K * (stats.cells[:40] >= 0).sum().expand(LAYERS))
    assert torch.equal(found.count.sum(1), found.coactivation.diagonal(dim1=-2, dim2=-1))


def test_sums_go_on_and_the_order_of_steps_does_not_matter() -> None:
    steps = [filled(seed) for seed in range(4)]
    sums = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        stats = RouterStats(LAYERS, EXPERTS, TOP_K, TAGS, ROWS, "cpu", torch.bfloat16)
        for i in order:
            for name in ("slab", "cells", "num_rows"):
                getattr(stats, name).copy_(getattr(steps[i], name))
            stats.add(ROWS)
        sums.append(stats.read())
    for name in ("count", "gate_sum", "confidence", "coactivation"):
        assert torch.equal(getattr(sums[0], name), getattr(sums[1], name)), name
    stats.reset()
    assert not any(tensor.any() for tensor in vars(stats.read()).values())


def test_switched_off() -> None:
    stats = filled(2)
    stats.num_rows.fill_(0)
    stats.add(ROWS)
    assert not stats.read().count.any()


def test_ties_go_to_the_smaller_id() -> None:
    chosen, gates = top_k_gates(torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]]), 2)
    assert chosen.tolist() == [[True, True, False, False, False]]
    assert gates.sum().item() == pytest.approx(1)


def test_buffers_of_the_20b_shape_are_small() -> None:
    stats = RouterStats(24, 32, 4, 8, 8192, "meta", torch.bfloat16)
    assert stats.num_bytes < 16 << 20
