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

HIDDEN = 256
"""Width of the trained gpt-oss."""


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
        gate = TinyGemmLinear(HIDDEN, 32, bias=True, quant_config=None, params_dtype=torch.bfloat16)
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
    sample = torch.randn(9, HIDDEN, dtype=torch.bfloat16)
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
    model.routers.apply(None)
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


def top_k_module(**changes: object) -> nn.Module:
    from sglang.srt.layers.moe.topk import TopKConfig

    module = nn.Module()
    module.topk_config = TopKConfig(top_k=4, **changes)
    return module


def test_how_experts_are_selected_is_read() -> None:
    def layer(module: nn.Module) -> routers.MoeLayer:
        block = nn.Module()
        block.topk = module
        return routers.MoeLayer("layer 0", nn.Module(), block, has_bias=True)

    assert routers.selected_top_k(layer(top_k_module())) == 4
    others = {"scoring_func": "sigmoid", "correction_bias": torch.zeros(3), "use_grouped_topk": True, "num_fused_shared_experts": 1}
    if not hasattr(top_k_module().topk_config, "num_fused_shared_experts"):
        others["shared_experts"] = others.pop("num_fused_shared_experts")  # SGLang 0.5.23
    for name, value in others.items():
        with pytest.raises(RefusedError, match=f"layer 0: experts are selected with {name}"):
            routers.selected_top_k(layer(top_k_module(**{name: value})))


def test_what_triton_kernels_selected_is_put_back_in_token_order() -> None:
    """Both forms of its routing, as 0.5.17 and 0.5.23 return it, from the same selections."""
    from types import SimpleNamespace as Routing

    ids = torch.tensor([[3, 1], [0, 3], [1, 2]])
    flat = ids.flatten()
    histogram, origins = torch.bincount(flat, minlength=4).int(), torch.argsort(flat, stable=True).int()
    old = Routing(routing_data=Routing(expt_hist=histogram), gather_indx=Routing(src_indx=origins))
    new = Routing(a_ragged_metadata=Routing(slice_sizes=histogram), scatter_indx=torch.cat([origins, torch.tensor([-1, -1]).int()]))
    assert torch.equal(routers.selected_ids(old, 2), ids)
    assert torch.equal(routers.selected_ids(new, 2), ids)  # one row of padding
    with pytest.raises(SeamError, match="it returns a"):
        routers.selected_ids(Routing(), 2)


def test_versions_are_known() -> None:
    assert seams.is_known()
    seams.check(seams.FRONT_END + seams.SCHEDULER)
