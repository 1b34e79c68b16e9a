"""Finding MoE blocks in a model that an engine has built, and checking the routers found there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from softprune.checkpoint.families import ModelSpec
from softprune.errors import RefusedError
from softprune.runtime.masked_model import RouterWeights
from softprune.seams import Seam, attribute


@dataclass(frozen=True)
class Site:
    """Where an architecture's MoE block keeps its router.

    Attributes:
        block: the block's class.
        router: the router's attribute in the block.
        has_bias: whether the checkpoint has a router bias.
    """

    block: Seam
    router: str
    has_bias: bool


def site_of(sites: Mapping[str, Site], spec: ModelSpec, engine: str) -> Site:
    """The site of a model's architecture.

    Raises:
        RefusedError: there is no proven one.
    """
    if spec.architecture not in sites:
        raise RefusedError(f"architecture {spec.architecture}: no proven place for a mask in {engine}; proven: {', '.join(sites)}")
    return sites[spec.architecture]


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


def router_weights(name: str, gate: nn.Module, has_bias: bool, spec: ModelSpec, package: str) -> RouterWeights:
    """A router as loaded, for the fingerprint.

    To be called before an engine packs weights: some kernels free them.

    Args:
        name: the router's name in the model.
        gate: its module.
        has_bias: whether the checkpoint has its bias.
        spec: the model's shape.
        package: the engine's.

    Raises:
        SeamError: the gate does not look as expected.
        RefusedError: its weight is not [num_experts, hidden].
    """
    weight: torch.Tensor = attribute(gate, "weight", "moe.router", package)
    if weight.dim() != 2 or weight.shape[0] != spec.num_experts:
        raise RefusedError(f"{name}.weight: found shape {list(weight.shape)}; expected [{spec.num_experts}, hidden]")
    return weight.data, attribute(gate, "bias", "moe.router", package).data if has_bias else None


def check_router_bias(name: str, bias: torch.Tensor | None, spec: ModelSpec) -> torch.Tensor:
    """A router's bias, if it is [num_experts].

    Raises:
        RefusedError: there is none, or it has another shape.
    """
    if bias is None or tuple(bias.shape) != (spec.num_experts,):
        raise RefusedError(f"{name}.bias: found {bias if bias is None else list(bias.shape)}; expected [{spec.num_experts}]")
    return bias.data
