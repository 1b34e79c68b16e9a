"""Finding the routers of a model that SGLang has built, per architecture.

gpt-oss routers bring a bias. Qwen3-MoE gates have none and are given one of zeros before the first
graph is captured: the GEMM then adds it in its epilogue.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn

from softprune.checkpoint.families import ModelSpec
from softprune.errors import RefusedError
from softprune.runtime.blocks import MoeLayer, Site, check_router_bias, find_layers, router_weights
from softprune.runtime.router_mask import Router
from softprune.sglang_ext import seams

SITES = {
    "GptOssForCausalLM": Site(seams.GPT_OSS_BLOCK, "router", has_bias=True),
    "Qwen3MoeForCausalLM": Site(seams.QWEN3_MOE_BLOCK, "gate", has_bias=False),
}

_SEAM = "moe.router"


find = partial(find_layers, sites=SITES, package="sglang", needs=("topk", "experts"))
weights = partial(router_weights, package="sglang")


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
    config = seams.attribute(layer.block.topk, "topk_config", seams.TOP_K.name)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    names = ["use_grouped_topk", "custom_routing_function", "correction_bias", "scoring_func"]
    # Since 0.5.19 or so, fused shared experts have a configuration of their own.
    names.append("shared_experts" if "shared_experts" in defaults else "num_fused_shared_experts")
    for name in names:
        value = seams.attribute(config, name, seams.TOP_K.name)
        if isinstance(value, torch.Tensor) or value != defaults[name]:
            raise RefusedError(f"{layer.name}: experts are selected with {name}; expected by the softmax of the router's logits alone")
    return int(seams.attribute(config, "top_k", seams.TOP_K.name))


def backend_of(layer: MoeLayer) -> str:
    """The MoE backend that a layer uses: how its experts are stored, and SGLang's name, e.g. "mxfp4/triton_kernel".

    Raises:
        SeamError: the layer does not say.
    """
    method = seams.attribute(layer.block.experts, "quant_method", _SEAM)
    stored = {"Mxfp4MoEMethod": "mxfp4", "UnquantizedFusedMoEMethod": "bf16"}.get(type(method).__name__, type(method).__name__)
    if layer.gate.weight.device.type == "cpu":
        return f"{stored}/native"  # whatever the flag says, SGLang runs plain PyTorch there
    backend = seams.attribute(method, "runner.runner_backend", "moe.runner_backend")
    return f"{stored}/{backend.value}"


def selected_ids(output: Any, top_k: int) -> torch.Tensor | None:
    """What a top-k module selected: ids [n, top_k], or None where a fused kernel keeps its selection to itself.

    Args:
        output: what the module returned.
        top_k: experts for each token.

    Raises:
        SeamError: the output is of an unknown kind.
    """
    if hasattr(output, "topk_ids"):
        ids: torch.Tensor = output.topk_ids
        return ids
    # triton_kernels: tokens' selections sorted by expert, and for each the place that it came from.
    if hasattr(output, "routing_data"):
        return _unsorted(output.routing_data.expt_hist, output.gather_indx.src_indx, top_k)
    if hasattr(output, "a_ragged_metadata"):
        return _unsorted(output.a_ragged_metadata.slice_sizes, output.scatter_indx, top_k)
    if type(output).__name__ == "BypassedTopKOutput":
        return None
    raise seams.TOP_K.missing(f"it returns a {type(output).__name__}")


def _unsorted(histogram: torch.Tensor, origins: torch.Tensor, top_k: int) -> torch.Tensor:
    experts = torch.arange(len(histogram), device=histogram.device).repeat_interleave(histogram)
    flat = torch.full((len(origins),), -1, device=histogram.device, dtype=experts.dtype)
    flat.scatter_(0, origins[: len(experts)].long(), experts)
    rows = flat.view(-1, top_k)
    return rows[rows[:, 0] >= 0]  # rows of padding select nothing
