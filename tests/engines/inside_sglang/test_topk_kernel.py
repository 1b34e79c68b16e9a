"""The top-k that gpt-oss really uses on a GPU, triton_kernels' own, in Triton's interpreter: -inf logits are never selected.

    TRITON_INTERPRET=1 .venv-sglang/bin/python -m pytest tests/engines/inside_sglang/test_topk_kernel.py

The kernel is called as its wrapper calls it, with plain tensors: the wrapper's own Tensor class does not run in the interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton decides at import; make test runs it by itself")


def triton_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(gates [n, k], ids [n, k]) of logits [n, num_experts], softmax over the chosen k."""
    from triton_kernels.topk_details._topk_forward import _topk_forward

    rows, experts = logits.shape
    padded = (experts + 31) // 32 * 32
    values, ids = torch.empty(rows, k, dtype=logits.dtype), torch.empty(rows, k, dtype=torch.int16)
    bits = torch.zeros(padded // 32, (rows + 31) // 32 * 32, dtype=torch.uint32).transpose(0, 1)
    _topk_forward[((rows + 31) // 32,)](
        logits, logits.stride(0), (values,), (ids,), values.stride(0), False, (bits,), bits.stride(0), bits.stride(1), rows, experts, 0,
        BLOCK_M=32, BLOCK_N=32, APPLY_SOFTMAX=True, N_EXPTS_PAD=padded, N_EXPTS_ACT=k,
    )  # fmt: skip
    return values, ids.long()


@pytest.mark.parametrize("experts", [32, 128])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kept", [4, 19, 24])
def test_pruned_experts_are_never_selected(experts: int, k: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(experts + k + kept)
    # Rounded to quarters, so that there are many ties; without -0.0, which the kernel's integer keys put below 0.0.
    logits = (torch.randn(100, experts, generator=generator) * 4).round().div(4) + 0.0
    keep = torch.randperm(experts, generator=generator)[:kept].sort().values
    masked = torch.full_like(logits, float("-inf"))
    masked[:, keep] = logits[:, keep]
    gates, ids = triton_topk(masked, k)
    assert torch.isin(ids, keep).all()
    assert torch.isfinite(gates).all()
    # What the sliced checkpoint's router would do: the same experts, ties and all, and the same gates to the last bit.
    sliced_gates, sliced_ids = triton_topk(logits[:, keep].contiguous(), k)
    assert torch.equal(keep[sliced_ids], ids)
    assert torch.equal(sliced_gates, gates)
    order = torch.sort(masked, dim=-1, descending=True, stable=True).indices[:, :k].sort().values
    assert torch.equal(ids, order)
    torch.testing.assert_close(gates, torch.softmax(masked.gather(1, ids), dim=-1))


def test_fewer_kept_than_k_selects_pruned_ones() -> None:
    """Why a mask must keep at least top_k experts: the kernel fills up with pruned ones, at gate 0."""
    masked = torch.full((3, 32), float("-inf"))
    masked[:, :2] = 1.0
    gates, ids = triton_topk(masked, 4)
    assert (ids > 1).sum(1).tolist() == [2, 2, 2]
    assert gates[ids > 1].tolist() == [0.0] * 6
