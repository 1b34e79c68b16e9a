"""Finding MoE blocks in a model that an engine has built, and checking the routers found there."""

from __future__ import annotations

import re

import torch
from torch import nn

from softprune.checkpoint.families import ModelSpec
from softprune.errors import RefusedError
from softprune.seams import Seam


def blocks_by_layer(model: nn.Module, block: Seam, spec: ModelSpec) -> list[tuple[str, nn.Module]]:
    """(name, module) of every MoE block, in layer order.

    Args:
        model: the loaded model.
        block: seam of the block's class.
        spec: which decoder layers have experts.

    Raises:
        SeamError: a block's name has no layer number.
        RefusedError: the model has blocks in other layers.
    """
    block_class = block.resolve()
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, block_class):
            match = re.search(r"layers\.(\d+)\.", name + ".")
            if match is None:
                raise block.missing(f"no layer number in {name!r}")
            found[int(match[1])] = (name, module)
    if sorted(found) != list(spec.moe_layers):
        raise RefusedError(f"the loaded model has MoE layers {sorted(found)}; expected {list(spec.moe_layers)}")
    return [found[layer] for layer in spec.moe_layers]


def check_router_weight(name: str, weight: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """A router's weight, if it is [num_experts, hidden].

    Raises:
        RefusedError: it has another shape.
    """
    if weight.dim() != 2 or weight.shape[0] != spec.num_experts:
        raise RefusedError(f"{name}.weight: found shape {list(weight.shape)}; expected [{spec.num_experts}, hidden]")
    return weight.data


def check_router_bias(name: str, bias: torch.Tensor | None, spec: ModelSpec) -> torch.Tensor:
    """A router's bias, if it is [num_experts].

    Raises:
        RefusedError: there is none, or it has another shape.
    """
    if bias is None or tuple(bias.shape) != (spec.num_experts,):
        raise RefusedError(f"{name}.bias: found {bias if bias is None else list(bias.shape)}; expected [{spec.num_experts}]")
    return bias.data
