"""The kernel that adds up what routers chose, in Triton's interpreter, against PyTorch.

TRITON_INTERPRET=1 .venv-sglang/bin/python -m pytest tests/engines/inside_sglang/test_router_stats_kernel.py
"""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton decides at import; make test runs it by itself")


@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (32, 4), (32, 2), (32, 1), (128, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_pytorch(experts: int, top_k: int, dtype: torch.dtype) -> None:
    from softprune.runtime import router_stats_kernel
    from softprune.runtime.router_stats import RouterStats

    generator = torch.Generator().manual_seed(experts + top_k)
    layers, tags, rows, valid = 2, 3, 77, 70
    both = [RouterStats(layers, experts, top_k, tags, rows, "cpu", dtype) for _ in range(2)]
    for _ in range(2):
        logits = (torch.randn(layers, rows, experts, generator=generator) * 4).round() / 2 + 0.0
        logits[1, :, 3 : experts - top_k] = -torch.inf
        cells = torch.randint(-1, 2 * tags, (rows,), generator=generator)
        for stats in both:
            stats.slab.copy_(logits)
            stats.cells.copy_(cells)
            stats.num_rows.fill_(valid)
        router_stats_kernel.add(both[0], rows)
        both[1].add_reference(rows)
    found, expected = both[0].read(), both[1].read()
    for name in ("count", "coactivation"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert expected.count.sum() == layers * top_k * expected.confidence[:, :, 0].sum()
    # exp differs in its last bit, which can move a gate over the border of a bin.
    assert torch.allclose(found.gate_sum, expected.gate_sum, atol=1e-5)
    assert torch.equal(found.confidence.sum(-1), expected.confidence.sum(-1))
    assert (found.confidence - expected.confidence).abs().sum() <= 0.02 * expected.confidence.sum()


def test_other_numbers_of_experts_are_refused() -> None:
    from softprune.runtime import router_stats_kernel
    from softprune.runtime.router_stats import RouterStats

    with pytest.raises(ValueError, match="24 experts"):
        router_stats_kernel.add(RouterStats(1, 24, 4, 1, 8, "cpu", torch.float32), 8)
