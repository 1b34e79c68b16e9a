"""Masking a router's bias, and counting what it selects, on plain PyTorch modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softprune.errors import RefusedError
from softprune.mask import ExpertMask
from softprune.runtime.route_probe import RouteProbe
from softprune.runtime.router_mask import Router, RouterMask

EXPERTS, HIDDEN, TOP_K = 8, 16, 2


def make_mask(keep: list[list[int] | None]) -> ExpertMask:
    model = {"architecture": "GptOssForCausalLM", "num_layers": len(keep), "num_experts": EXPERTS, "top_k": TOP_K, "fingerprint": None}
    return ExpertMask.parse({"format": "softprune.expert-mask", "version": 1, "model": model, "keep": keep}, "test")


def make_routers(dtype: torch.dtype = torch.bfloat16) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(HIDDEN, EXPERTS, dtype=dtype) for _ in range(3)]


def attach(modules: list[nn.Linear]) -> RouterMask:
    return RouterMask([Router(f"layer {i}", module.bias.data, module) for i, module in enumerate(modules)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_softmax_is_that_of_the_kept_experts(dtype: torch.dtype) -> None:
    modules = make_routers(dtype)
    state, mask = attach(modules), make_mask([[1, 4, 6], None, [0, 7]])
    hidden = torch.randn(50, HIDDEN).to(dtype)
    before = [module(hidden) for module in modules]
    state.apply(mask)
    for layer, module in enumerate(modules):
        kept = torch.tensor(mask.kept(layer))
        values, ids = module(hidden).topk(TOP_K)
        expected_values, positions = before[layer][:, kept].topk(TOP_K)
        assert torch.equal(ids, kept[positions])
        assert torch.equal(values.softmax(-1), expected_values.softmax(-1))


def test_masks_leave_no_trace_and_addresses_stay() -> None:
    modules = make_routers()
    loaded = [module.bias.detach().clone() for module in modules]
    addresses = [module.bias.data_ptr() for module in modules]
    state = attach(modules)
    state.apply(make_mask([[0, 1], [2, 3], [4, 5]]))
    state.apply(make_mask([[6, 7], None, [4, 5]]))
    assert [int(module.bias.isneginf().sum()) for module in modules] == [6, 0, 6]
    state.remove()
    assert all(torch.equal(module.bias, bias) for module, bias in zip(modules, loaded, strict=True))
    assert [module.bias.data_ptr() for module in modules] == addresses


def test_verify_accepts_a_router_that_obeys() -> None:
    state = attach(make_routers())
    state.verify(HIDDEN, torch.bfloat16)
    state.apply(make_mask([[0, 1], None, [4, 5]]))
    state.verify(HIDDEN, torch.bfloat16)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_verify_finds_a_router_that_ignores_its_bias(layer: int) -> None:
    """As a GEMM without a bias, or one that keeps a copy of it, would."""
    modules = make_routers()
    copies = [module.bias.detach().clone() for module in modules]

    def deaf(hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, modules[layer].weight, copies[layer])

    routers = [Router(f"layer {i}", module.bias.data, deaf if i == layer else module) for i, module in enumerate(modules)]
    state = RouterMask(routers)
    state.apply(make_mask([[0, 1], [2, 3], [4, 5]]))
    with pytest.raises(RefusedError, match=f"layer {layer}: found logits .* for pruned expert"):
        state.verify(HIDDEN, torch.bfloat16)


def test_verify_finds_a_kept_expert_that_is_gone() -> None:
    modules = make_routers()
    state = attach(modules)
    modules[1].bias.data[3] = float("-inf")
    with pytest.raises(RefusedError, match="layer 1: found logits .* for kept expert 3"):
        state.verify(HIDDEN, torch.bfloat16)


def test_probe_counts_ids_and_logits_alike() -> None:
    probe = RouteProbe(2, EXPERTS, torch.device("cpu"))
    logits = torch.randn(100, EXPERTS)
    probe.record_ids(0, logits.topk(TOP_K).indices)
    probe.record_logits(1, logits, TOP_K)
    snapshot = probe.snapshot()
    assert snapshot["tokens"] == [100, 100]
    assert snapshot["counts"][0] == snapshot["counts"][1]
    assert sum(snapshot["counts"][0]) == 100 * TOP_K
    probe.reset()
    assert probe.snapshot() == {"tokens": [0, 0], "counts": [[0] * EXPERTS] * 2}


def test_probe_breaks_ties_by_the_smaller_id() -> None:
    probe = RouteProbe(1, EXPERTS, torch.device("cpu"))
    probe.record_logits(0, torch.zeros(5, EXPERTS), TOP_K)
    assert probe.snapshot()["counts"] == [[5, 5, 0, 0, 0, 0, 0, 0]]
