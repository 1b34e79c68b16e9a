"""Finding MoE blocks in a model that an engine has built, and checking the routers found there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from softprune.checkpoint.families import ModelSpec
from softprune.errors import RefusedError
from softprune.runtime.masked_model import RouterWeights
from softprune.seams import Seam, attribute, engine


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


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a loaded model.

    Attributes:
        name: the router's name in the model.
        gate: the router's module.
        block: the engine's block around it; has the attributes that `find_layers` was asked to see there.
        has_bias: whether the checkpoint has a router bias.
    """

    name: str
    gate: nn.Module
    block: Any
    has_bias: bool


def find_layers(model: nn.Module, spec: ModelSpec, *, sites: Mapping[str, Site], package: str, needs: Sequence[str]) -> list[MoeLayer]:
    """All MoE layers of a model, in layer order.

    Args:
        model: the loaded model.
        spec: its shape.
        sites: architecture -> where its blocks keep their routers.
        package: the engine's.
        needs: what else a block has to have.

    Raises:
        RefusedError: the architecture has no proven place for a mask, or a layer is missing here.
        SeamError: a block does not look as expected.
    """
    site = sites.get(spec.architecture)
    if site is None:
        raise RefusedError(f"architecture {spec.architecture}: no proven place for a mask in {engine(package)}; proven: {', '.join(sites)}")
    layers = []
    for name, block in _blocks_by_layer(model, site.block, spec):
        for needed in needs:
            attribute(block, needed, site.block.name, package)
        gate = attribute(block, site.router, site.block.name, package)
        layers.append(MoeLayer(f"{name}.{site.router}", gate, block, site.has_bias))
    return layers


def _blocks_by_layer(model: nn.Module, block: Seam, spec: ModelSpec) -> list[tuple[str, nn.Module]]:
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


def router_weights(layer: MoeLayer, spec: ModelSpec, package: str) -> RouterWeights:
    """A layer's router as loaded, for the fingerprint.

    To be called before an engine packs weights: some kernels free them.

    Raises:
        SeamError: the gate does not look as expected.
        RefusedError: its weight is not [num_experts, hidden].
    """
    weight: torch.Tensor = attribute(layer.gate, "weight", "moe.router", package)
    if weight.dim() != 2 or weight.shape[0] != spec.num_experts:
        raise RefusedError(f"{layer.name}.weight: found shape {list(weight.shape)}; expected [{spec.num_experts}, hidden]")
    return weight.data, attribute(layer.gate, "bias", "moe.router", package).data if layer.has_bias else None


def check_router_bias(name: str, bias: torch.Tensor | None, spec: ModelSpec) -> torch.Tensor:
    """A router's bias, if it is [num_experts].

    Raises:
        RefusedError: there is none, or it has another shape.
    """
    if bias is None or tuple(bias.shape) != (spec.num_experts,):
        raise RefusedError(f"{name}.bias: found {bias if bias is None else list(bias.shape)}; expected [{spec.num_experts}]")
    return bias.data
