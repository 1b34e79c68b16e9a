"""Masking a router's bias, and counting what it selects, on plain PyTorch modules."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from softprune.control import refusal_among
from softprune.errors import RefusedError
from softprune.mask import ExpertMask
from softprune.runtime.route_probe import RouteProbe
from softprune.runtime.router_mask import Router, RouterMask
from tests.unit import fake_control

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
    state.apply(None)
    assert all(torch.equal(module.bias, bias) for module, bias in zip(modules, loaded, strict=True))
    assert [module.bias.data_ptr() for module in modules] == addresses


def biases(modules: list[nn.Linear]) -> list[torch.Tensor]:
    return [module.bias.detach().clone() for module in modules]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_staging_changes_nothing_until_the_commit() -> None:
    modules = make_routers()
    state, loaded = attach(modules), biases(modules)
    first, second = make_mask([[0, 1], [2, 3], [4, 5]]), make_mask([[6, 7], None, [0, 1, 2]])
    state.stage(first)
    assert (state.mask, same(biases(modules), loaded)) == (None, True)
    state.stage(second)  # the last one staged counts
    state.commit()
    assert state.mask == second
    assert [int(bias.isneginf().sum()) for bias in biases(modules)] == [6, 0, 5]
    # What is staged starts from the biases as loaded, not from those in force.
    state.stage(first)
    state.commit()
    assert [[int(i) for i in bias.isfinite().nonzero()] for bias in biases(modules)] == first.keep
    state.stage(None)
    assert state.mask == first
    state.commit()
    assert (state.mask, same(biases(modules), loaded)) == (None, True)


def test_what_is_dropped_or_committed_cannot_be_committed_again() -> None:
    modules = make_routers()
    state, loaded = attach(modules), biases(modules)
    with pytest.raises(RuntimeError, match="no mask is staged"):
        state.commit()
    state.drop()
    state.stage(make_mask([[0, 1], [2, 3], [4, 5]]))
    state.drop()
    with pytest.raises(RuntimeError, match="no mask is staged"):
        state.commit()
    assert (state.mask, same(biases(modules), loaded)) == (None, True)
    state.apply(make_mask([[0, 1], None, None]))
    with pytest.raises(RuntimeError, match="no mask is staged"):
        state.commit()


def test_remembering_takes_reloaded_biases_for_the_loaded_ones() -> None:
    modules = make_routers()
    state = attach(modules)
    for module in modules:
        module.bias.data.add_(1.0)
    reloaded = biases(modules)
    state.remember()
    state.apply(make_mask([[0, 1], [2, 3], [4, 5]]))
    state.apply(None)
    assert same(biases(modules), reloaded)


STAGED = fake_control.make_mask([[0, 1, 2], None, [3, 4]])


@pytest.mark.parametrize(
    ("change", "status", "kind", "message"),
    [
        ({"keep": [[0], None, None]}, 400, "invalid_mask", "request body: keep[0]: found 1 experts kept"),
        ({"model": {**STAGED.model.model_dump(), "num_layers": 4}, "keep": [None] * 4}, 400, "invalid_mask", "3, as the model has"),
        ({"model": {**STAGED.model.model_dump(), "fingerprint": "sha256:" + "0" * 64}}, 400, "invalid_mask", "model.fingerprint: found"),
        ({"top_k": 1}, 409, "top_k_is_fixed_at_launch", "top_k: found 1; expected 2"),
        ({"top_k": [2, 1, 2]}, 409, "top_k_is_fixed_at_launch", "top_k: found 1; expected 2"),
        ({"format": "x"}, 400, "invalid_mask", "format: found 'x'"),
    ],
)
def test_a_process_answers_why_it_cannot(change: dict[str, Any], status: int, kind: str, message: str) -> None:
    model = fake_control.make_model()
    answer = model.stage(json.dumps({**json.loads(STAGED.dump()), **change}))
    assert answer is not None
    assert (answer["status"], answer["kind"]) == (status, kind)
    assert message in answer["message"]
    assert json.loads(json.dumps(answer)) == answer
    assert model.mask_text() is None
    with pytest.raises(RuntimeError, match="no mask is staged"):
        model.commit()


@pytest.mark.parametrize("text", ["", "{", "null", "[" * 100_000, "\ud800", "[" + "1" * 5000 + "]"])
def test_a_process_answers_whatever_it_is_sent(text: str) -> None:
    """An exception would leave the other processes waiting."""
    answer = fake_control.make_model().stage(text)
    assert answer is not None
    assert answer["status"] in (400, 500)


def test_a_process_switches() -> None:
    model = fake_control.make_model()
    fresh = model.status()
    assert fresh["mask"] is None
    assert (fresh["architecture"], fresh["num_layers"], fresh["num_experts"], fresh["top_k"], fresh["model_top_k"]) == (
        "GptOssForCausalLM", 3, 8, 2, 2,
    )  # fmt: skip
    assert model.stage(STAGED.dump()) is None
    assert model.status() == fresh
    assert model.commit() == {**fresh, "mask": {"hash": STAGED.hash, "num_kept": [3, 8, 2]}} == model.status()
    assert ExpertMask.parse(json.loads(model.mask_text() or ""), "text") == STAGED
    assert model.verified() is None
    assert model.stage(json.dumps({**json.loads(STAGED.dump()), "top_k": 1})) is not None
    assert model.stage(None) is None
    model.drop()
    assert model.status()["mask"]["hash"] == STAGED.hash
    model.routers.routers[0].bias[7] = 1.0  # pruned
    verdict = model.verified()
    assert verdict is not None
    assert (verdict["status"], verdict["kind"]) == (409, "refused")
    assert model.stage(None) is None
    assert model.commit() == fresh


def test_a_refusal_after_a_staging_leaves_it_to_be_dropped() -> None:
    """Another process may have staged what this one refuses; `drop` is called on all."""
    models = [fake_control.make_model(), fake_control.make_model(seed=1)]
    text = fake_control.make_mask([[0, 1, 2], None, [3, 4]], models[0]).dump()
    votes = [model.stage(text) for model in models]
    refused = refusal_among(votes)
    assert votes[0] is None
    assert refused is not None
    assert refused["message"].startswith("process 1: request body: model.fingerprint")
    for model in models:
        model.drop()
        with pytest.raises(RuntimeError):
            model.commit()
    assert refusal_among([None, None]) is None
    assert refusal_among([votes[1]]) == votes[1]


def test_the_probe_tells_epochs_apart() -> None:
    model = fake_control.make_model()
    probe = model.add_probe()
    probe.record_ids(0, torch.tensor([[0, 1], [2, 3]]))
    model.stage(STAGED.dump())
    model.commit()
    probe.record_ids(0, torch.tensor([[0, 2]]))
    snapshot = model.routes()
    assert snapshot["tokens"] == [3, 0, 0]
    assert {epoch: one["counts"][0] for epoch, one in snapshot["epochs"].items()} == {
        "0": [1, 1, 1, 1, 0, 0, 0, 0], "1": [1, 0, 1, 0, 0, 0, 0, 0],
    }  # fmt: skip
    assert {epoch: one["tokens"] for epoch, one in snapshot["epochs"].items()} == {"0": [2, 0, 0], "1": [1, 0, 0]}
    assert model.routes(reset=True) == snapshot
    assert list(model.routes()["epochs"]) == ["1"]
    with pytest.raises(RefusedError, match="the route probe is off"):
        fake_control.make_model().routes()


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
    zero = {"tokens": [0, 0], "counts": [[0] * EXPERTS] * 2}
    assert probe.snapshot() == {**zero, "epochs": {"0": zero}}


def test_probe_breaks_ties_by_the_smaller_id() -> None:
    probe = RouteProbe(1, EXPERTS, torch.device("cpu"))
    probe.record_logits(0, torch.zeros(5, EXPERTS), TOP_K)
    assert probe.snapshot()["counts"] == [[5, 5, 0, 0, 0, 0, 0, 0]]
