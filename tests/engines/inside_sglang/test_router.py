"""SGLang's own gpt-oss router, masked on the CPU."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from sglang.srt.models.gpt_oss import TinyGemmLinear
from torch import nn

from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.headers import TensorIndex
from softprune.errors import MaskError, RefusedError, SeamError
from softprune.launch import LaunchRequest
from softprune.runtime.masked_model import MaskedModel
from softprune.sglang_ext import routers, seams


class Experts(nn.Module):
    """Stands where SGLang's experts would; routers are the subject here."""


def built(model: Path) -> tuple[nn.Module, list[TinyGemmLinear]]:
    """SGLang's blocks, with its routers and a checkpoint's router weights in them, as `routers.find` meets them."""
    from sglang.srt.models.gpt_oss import GptOssSparseMoeBlock

    index, root, gates = TensorIndex(model), nn.Module(), []
    root.layers = nn.ModuleList()
    for layer in range(4):
        block = GptOssSparseMoeBlock.__new__(GptOssSparseMoeBlock)
        nn.Module.__init__(block)
        gate = TinyGemmLinear(128, 32, bias=True, quant_config=None, params_dtype=torch.bfloat16)
        gate.weight.data.copy_(index.load(f"model.layers.{layer}.mlp.router.weight"))
        gate.bias.data.copy_(index.load(f"model.layers.{layer}.mlp.router.bias"))
        block.router, block.topk, block.experts = gate, nn.Module(), Experts()
        root.layers.append(nn.Module())
        root.layers[-1].mlp = block
        gates.append(gate)
    return root, gates


def masked(model: Path, mask: str, root: nn.Module) -> MaskedModel:
    spec = spec_of(read_config(model))
    launch = LaunchRequest(expert_mask=mask).resolve(read_config(model), str(model))
    layers = routers.find(root, spec)
    loaded = [routers.weights(layer, spec) for layer in layers]
    return MaskedModel(launch, spec, loaded, [routers.attach(layer, spec) for layer in layers], logging.getLogger())


def test_pruned_logits_are_minus_infinity_and_kept_ones_unchanged(models: dict[str, Path], keep24: str) -> None:
    root, gates = built(models["gpt-oss"])
    sample = torch.randn(9, 128, dtype=torch.bfloat16)
    before = [gate(sample)[0].clone() for gate in gates]
    addresses = [gate.bias.data_ptr() for gate in gates]
    model = masked(models["gpt-oss"], keep24, root)
    model.verify()
    mask = model.routers.mask
    for layer, gate in enumerate(gates):
        after = gate(sample)[0]
        assert torch.isneginf(after[:, mask.pruned(layer)]).all()
        assert torch.equal(after[:, mask.kept(layer)], before[layer][:, mask.kept(layer)])
        assert gate.bias.data_ptr() == addresses[layer]  # captured graphs stay valid
    model.routers.remove()
    assert all(torch.equal(gate(sample)[0], logits) for gate, logits in zip(gates, before, strict=True))


def test_a_router_that_ignores_its_bias_is_noticed(models: dict[str, Path], keep24: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, gates = built(models["gpt-oss"])
    model = masked(models["gpt-oss"], keep24, root)
    monkeypatch.setattr(gates[2], "forward", lambda x: (nn.functional.linear(x, gates[2].weight), None))
    with pytest.raises(RefusedError, match=r"layers\.2\.mlp\.router: found logits .* The router does not obey its bias"):
        model.verify()


def test_other_weights_than_the_masks_are_refused(models: dict[str, Path], keep24: str) -> None:
    root, gates = built(models["gpt-oss"])
    gates[1].weight.data[0, 0] += 1
    with pytest.raises(MaskError, match="fingerprint"):
        masked(models["gpt-oss"], keep24, root)


def test_a_missing_layer_or_target_is_refused(models: dict[str, Path], keep24: str) -> None:
    root, _ = built(models["gpt-oss"])
    del root.layers[3]
    with pytest.raises(RefusedError, match=r"the loaded model has MoE layers \[0, 1, 2\]; expected \[0, 1, 2, 3\]"):
        masked(models["gpt-oss"], keep24, root)
    root, gates = built(models["gpt-oss"])
    del root.layers[0].mlp.topk
    with pytest.raises(SeamError, match="has no 'topk'"):
        masked(models["gpt-oss"], keep24, root)
    root, gates = built(models["gpt-oss"])
    gates[0].skip_bias_add = True
    with pytest.raises(RefusedError, match="leaves this gate's bias out"):
        masked(models["gpt-oss"], keep24, root)


def test_versions_are_known() -> None:
    assert seams.is_known()
    seams.check(seams.FRONT_END + seams.SCHEDULER)
