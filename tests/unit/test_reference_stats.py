"""The reference statistics are the sums that the formulas name, of what the model really did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprune.errors import RefusedError
from softprune.evaluate.packing import Blocks
from softprune.evaluate.reference import load_reference, score
from softprune.evaluate.reference_stats import collect
from softprune.mask import MaskModel
from softprune.ranking.api import model_of_checkpoint
from softprune.stats.file import Statistics, read, write
from softprune.stats.grid import DEFAULT_GRID, bin_of

LENGTH = 24


def some_blocks(seed: int, number: int = 2) -> Blocks:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 480, (number, LENGTH)).astype(np.int32)
    keep = rng.random((number, LENGTH)) < 0.6
    keep[:, 0] = False
    return Blocks(ids, keep, np.zeros_like(ids), 1, f"{seed:064x}")


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> Any:
    return load_reference(models["gpt-oss"])


@pytest.fixture(scope="module")
def shape(models: dict[str, Path]) -> MaskModel:
    return model_of_checkpoint(models["gpt-oss"])


def outputs_by_hand(model: Any, ids: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(chosen, gates, norms) of each layer, from every expert's output for every token."""
    inputs: list[torch.Tensor] = []
    handles = [layer.mlp.register_forward_pre_hook(lambda _m, args: inputs.append(args[0][0])) for layer in model.model.layers]
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
        for handle in handles:
            handle.remove()
        found = []
        for layer, hidden in zip(model.model.layers, inputs, strict=True):
            router, experts = layer.mlp.router, layer.mlp.experts
            top, chosen = (hidden @ router.weight.T + router.bias).topk(router.top_k)
            gate_up = torch.einsum("th,eho->teo", hidden, experts.gate_up_proj) + experts.gate_up_proj_bias
            gate, up = gate_up[..., ::2].clamp(max=7), gate_up[..., 1::2].clamp(-7, 7)
            acts = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            norms = (torch.einsum("tei,eih->teh", acts, experts.down_proj) + experts.down_proj_bias).norm(dim=-1)
            found.append((chosen, top.softmax(-1), norms.gather(1, chosen)))
    return found


@pytest.mark.parametrize("attribution", ["predictor", "target"])
def test_sums_by_hand(model: Any, shape: MaskModel, attribution: Any) -> None:
    blocks = {"a": some_blocks(1), "b": some_blocks(2, 1)}
    statistics, record = collect(model, shape, blocks, attribution=attribution, record=True)
    assert statistics.header.tags == ["default", "a", "b"]
    size = (3, shape.num_layers, shape.num_experts)
    count, norm, gate_norm = np.zeros(size), np.zeros(size), np.zeros(size)
    grid = np.zeros((*size, len(DEFAULT_GRID.log10_p) - 1, len(DEFAULT_GRID.entropy) - 1))
    for tag, pack in enumerate(blocks.values(), 1):
        for ids, keep in zip(pack.ids, pack.keep, strict=True):
            scores = score(model, ids[None], entropies=True)
            assert scores.top_entropy is not None
            for layer, (chosen, gates, norms) in enumerate(outputs_by_hand(model, ids)):
                for t in np.flatnonzero(keep):
                    x = bin_of(np.array(scores.log_p[0, t] / np.log(10)), DEFAULT_GRID.log10_p)
                    y = bin_of(np.array(scores.top_entropy[0, t]), DEFAULT_GRID.entropy)
                    source = t - 1 if attribution == "predictor" else t
                    for e, g, n in zip(chosen[t], gates[t], norms[t], strict=True):
                        count[tag, layer, e] += 1
                        norm[tag, layer, e] += float(n)
                        gate_norm[tag, layer, e] += float(g) * float(n)
                    for e, g, n in zip(chosen[source], gates[source], norms[source], strict=True):
                        grid[tag, layer, e, x, y] += float(g) * float(n)
    assert np.array_equal(statistics["reap.count"], count)
    np.testing.assert_allclose(statistics["reap.norm_sum"], norm, rtol=1e-5)
    np.testing.assert_allclose(statistics["reap.gate_norm_sum"], gate_norm, rtol=1e-5)
    np.testing.assert_allclose(statistics["eaft.grid_gate_norm"][:, 0], grid, rtol=1e-5, atol=1e-6)
    assert not statistics["eaft.grid_gate_norm"][:, 1].any()
    kept = sum(pack.num_kept for pack in blocks.values())
    assert record is not None
    assert record.chosen.shape == (shape.num_layers, kept, shape.top_k)
    assert statistics["eaft.hist"].sum() == len(record.log_p) == kept
    assert statistics["eaft.nll_sum"].sum() == pytest.approx(-record.log_p.sum(dtype=np.float64), rel=1e-6)
    assert np.array_equal(np.bincount(record.tag, minlength=3), statistics["eaft.hist"].sum((1, 2, 3)))
    again = np.zeros(size[1:])
    for layer in range(shape.num_layers):
        np.add.at(again[layer], record.chosen[layer], record.gates[layer].astype(np.float64) * record.norms[layer])
    np.testing.assert_allclose(statistics["eaft.grid_gate_norm"].sum((0, 1, 4, 5)), again, atol=1e-4)


def test_every_token_is_routed(model: Any, shape: MaskModel, tmp_path: Path) -> None:
    statistics, record = collect(model, shape, {"default": some_blocks(3)}, reap_everywhere=True)
    assert record is None
    tokens = 2 * LENGTH
    assert np.array_equal(statistics["router.count"].sum((0, 1, 3)), np.full(shape.num_layers, tokens * shape.top_k))
    assert np.array_equal(statistics["router.count"].sum(1), statistics["reap.count"])
    np.testing.assert_allclose(statistics["router.gate_sum"].sum((0, 1, 3)), tokens, rtol=1e-6)
    assert np.array_equal(statistics["router.confidence"].sum((0, 1, 3)), np.full(shape.num_layers, tokens))
    write(statistics, tmp_path / "s.safetensors")
    assert Statistics.of(read(tmp_path / "s.safetensors").header, statistics.tensors).header == statistics.header


def test_target_counts_are_those_of_reap(model: Any, shape: MaskModel) -> None:
    statistics, _ = collect(model, shape, {"a": some_blocks(4)}, attribution="target")
    assert np.array_equal(statistics["eaft.grid_count"].sum((1, 4, 5)), statistics["reap.count"])
    np.testing.assert_allclose(statistics["eaft.grid_gate_norm"].sum((1, 4, 5)), statistics["reap.gate_norm_sum"], atol=1e-4)


def test_quantised_experts_are_refused(shape: MaskModel) -> None:
    with pytest.raises(RefusedError, match="plain weights"):
        collect(torch.nn.Linear(2, 2), shape, {"a": some_blocks(5)})


def test_bins() -> None:
    found = bin_of(np.array([-9.0, -8.0, -1.0, -0.5, 0.0, 1.0]), [-8.0, -1.0, 0.0])
    assert found.tolist() == [0, 0, 1, 1, 1, 1]
