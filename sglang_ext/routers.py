"""Finding the routers of a model that SGLang has built, per architecture.

gpt-oss routers bring a bias. Qwen3-MoE gates have none and are given one of zeros before the first
graph is captured: the GEMM then adds it in its epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from softprune.checkpoint.families import ModelSpec
from softprune.errors import RefusedError
from softprune.runtime.blocks import blocks_by_layer, check_router_bias, check_router_weight
from softprune.runtime.masked_model import RouterWeights
from softprune.runtime.router_mask import Router
from softprune.sglang_ext import seams


@dataclass(frozen=True)
class Site:
    """Where an architecture's MoE block keeps its router.

    Attributes:
        block: the block's class.
        router: the router's attribute in the block.
        has_bias: whether the checkpoint has a router bias.
    """

    block: seams.Seam
    router: str
    has_bias: bool


SITES = {
    "GptOssForCausalLM": Site(seams.GPT_OSS_BLOCK, "router", has_bias=True),
    "Qwen3MoeForCausalLM": Site(seams.QWEN3_MOE_BLOCK, "gate", has_bias=False),
}

_SEAM = "moe.router"


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a loaded model: its router module, what selects, and what computes."""

    name: str
    gate: nn.Module
    top_k: nn.Module
    experts: nn.Module
    has_bias: bool


def find(model: nn.Module, spec: ModelSpec) -> list[MoeLayer]:
    """All MoE layers of a model, in layer order.

    Raises:
        RefusedError: the architecture has no proven place for a mask, or a layer is missing here.
        SeamError: a block does not look as expected.
    """
    site = SITES.get(spec.architecture)
    if site is None:
        raise RefusedError(f"architecture {spec.architecture}: no proven place for a mask in {seams.engine()}; proven: {', '.join(SITES)}")
    return [
        MoeLayer(
            f"{name}.{site.router}",
            seams.attribute(block, site.router, site.block.name),
            seams.attribute(block, "topk", site.block.name),
            seams.attribute(block, "experts", site.block.name),
            site.has_bias,
        )
        for name, block in blocks_by_layer(model, site.block, spec)
    ]


def weights(layer: MoeLayer, spec: ModelSpec) -> RouterWeights:
    """A layer's router as loaded, for the fingerprint.

    Raises:
        SeamError: the gate does not look as expected.
        RefusedError: its shape is not the model's.
    """
    weight = check_router_weight(layer.name, seams.attribute(layer.gate, "weight", _SEAM), spec)
    return weight, seams.attribute(layer.gate, "bias", _SEAM).data if layer.has_bias else None


def attach(layer: MoeLayer, spec: ModelSpec) -> Router:
    """The router of a layer with a bias that can be masked; adds one where the model has none.

    Raises:
        SeamError: the gate does not look as expected.
        RefusedError: its bias is not applied, or has another shape.
    """
    gate: Any = layer.gate
    if seams.attribute(gate, "skip_bias_add", _SEAM):
        raise RefusedError(f"{layer.name}: the engine leaves this gate's bias out of its logits")
    if not layer.has_bias:
        weight = gate.weight
        gate.register_parameter("bias", nn.Parameter(torch.zeros_like(weight[:, 0]), requires_grad=False))
    bias = check_router_bias(layer.name, seams.attribute(gate, "bias", _SEAM), spec)
    return Router(layer.name, bias, lambda hidden: gate(hidden)[0])


def selected_top_k(layer: MoeLayer) -> int:
    """How many experts the engine selects for each token.

    Raises:
        SeamError: the layer does not say.
        RefusedError: it selects by something else than the router's logits.
    """
    config = seams.attribute(layer.top_k, "topk_config", seams.TOP_K.name)
    for name in ("use_grouped_topk", "custom_routing_function", "correction_bias", "num_fused_shared_experts"):
        value = getattr(config, name, None)
        if value is not None and value is not False and value != 0:
            raise RefusedError(f"{layer.name}: experts are selected with {name}; expected by the router's logits alone")
    return int(seams.attribute(config, "top_k", seams.TOP_K.name))


def backend_of(layer: MoeLayer) -> str:
    """The MoE backend that a layer uses: how its experts are stored, and SGLang's name, e.g. "mxfp4/triton_kernel".

    Raises:
        SeamError: the layer does not say.
    """
    method = seams.attribute(layer.experts, "quant_method", _SEAM)
    stored = {"Mxfp4MoEMethod": "mxfp4", "UnquantizedFusedMoEMethod": "bf16"}.get(type(method).__name__, type(method).__name__)
    if layer.gate.weight.device.type == "cpu":
        return f"{stored}/native"  # whatever the flag says, SGLang runs plain PyTorch there
    backend = seams.attribute(method, "runner.runner_backend", "moe.runner_backend")
    return f"{stored}/{backend.value}"


def selected_ids(inputs: tuple[Any, ...], output: Any, top_k: int) -> torch.Tensor | None:
    """What a top-k module selected: ids [n, top_k], or None where a fused kernel keeps its selection to itself.

    Args:
        inputs: (hidden states [n, hidden], logits [n, num_experts], …).
        output: what the module returned.
        top_k: experts for each token.
    """
    if hasattr(output, "topk_ids"):
        ids: torch.Tensor = output.topk_ids
        return ids
    if hasattr(output, "routing_data"):  # triton_kernels: rows sorted by expert, and where each came from
        histogram = output.routing_data.expt_hist
        experts = torch.arange(len(histogram), device=histogram.device).repeat_interleave(histogram)
        return torch.empty_like(experts).scatter_(0, output.gather_indx.src_indx.long(), experts).view(-1, top_k)
    return None
