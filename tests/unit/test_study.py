"""The study's way of profiling, as its speed is measured, is the reference's computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprune.evaluate.packing import Blocks
from softprune.evaluate.reference import load_reference
from softprune.evaluate.reference_stats import collect
from softprune.ranking.api import model_of_checkpoint
from tests.gpu.study import hooks, load, load_by_transformers

LENGTH = 96


@pytest.fixture(scope="module")
def base(models: dict[str, Path]) -> Path:
    return models["gpt-oss-mxfp4"]


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return load(base, "cpu", torch.float32)


def test_hooks_add_up_what_the_reference_does(base: Path, model: Any) -> None:
    ids = np.random.default_rng(0).integers(0, 480, (2, LENGTH)).astype(np.int32)
    shape = model_of_checkpoint(base)
    blocks = Blocks(ids, np.zeros(ids.shape, bool), np.zeros_like(ids), 1, f"{0:064x}")
    expected, _ = collect(load_reference(base), shape, {"default": blocks}, reap_everywhere=True)
    with hooks(model, LENGTH) as sums, torch.inference_mode():
        for row in ids:
            model(input_ids=torch.from_numpy(row.astype(np.int64))[None])
    np.testing.assert_array_equal(sums["count"].numpy(), expected["reap.count"][0])
    np.testing.assert_allclose(sums["gate"].numpy(), expected["router.gate_sum"][0].sum(0), rtol=1e-4)
    np.testing.assert_allclose(sums["norm"].numpy(), expected["reap.norm_sum"][0], rtol=1e-4)
    np.testing.assert_allclose(sums["gate_norm"].numpy(), expected["reap.gate_norm_sum"][0], rtol=1e-4)
    assert sums["count"].sum() == 2 * LENGTH * shape.top_k * shape.num_layers


def test_tokens_are_strided(model: Any) -> None:
    mlp, inputs = model.model.layers[0].mlp, []
    handle = mlp.router.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with hooks(model, 5) as sums, torch.inference_mode():
        model(input_ids=torch.arange(LENGTH)[None])
    handle.remove()
    hidden = inputs[0][[0, 19, 38, 57, 76]]
    expected = torch.zeros_like(sums["norm"][0])
    with torch.inference_mode():
        for token, chosen in zip(hidden, mlp.router(hidden)[2].tolist(), strict=True):
            for expert in chosen:
                expected[expert] += mlp.experts(token[None], torch.tensor([[expert]]), torch.ones(1, 1)).norm().double()
    torch.testing.assert_close(sums["norm"][0], expected, rtol=1e-4, atol=0)


def test_both_ways_to_load_give_the_same_weights(base: Path) -> None:
    one, other = (dict(model.named_parameters()) for model in (load(base, "cpu"), load_by_transformers(base, "cpu")))
    assert one.keys() == other.keys()
    for name, weights in one.items():
        assert torch.equal(weights.to(torch.bfloat16), other[name].to(torch.bfloat16)), name
