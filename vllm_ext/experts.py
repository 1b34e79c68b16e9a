"""Running chosen ones of vLLM's experts, by the kernels and on the weights that serve: for the norms of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from softprune.errors import RefusedError
from softprune.runtime.blocks import MoeLayer
from softprune.runtime.expert_norms import Experts, leaving_no_choice
from softprune.vllm_ext import seams

_Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def experts_of(layers: Sequence[MoeLayer], hidden_size: int) -> Experts:
    """The experts of a model's layers; to be called when its weights are packed.

    Args:
        layers: in order.
        hidden_size: width of their input, as the checkpoint has it.

    Raises:
        SeamError: a layer does not look as expected.
        RefusedError: its kernel chooses experts itself, and not by a number that can be changed.
    """
    runs = [_of_layer(layer, hidden_size) for layer in layers]
    return lambda layer, hidden, ids, gates: runs[layer](hidden, ids, gates)


def _of_layer(layer: MoeLayer, width: int) -> _Run:
    routed: Any = seams.attribute(layer.block.experts, "routed_experts", seams.MOE_RUNNER.name)
    kernel_width = int(seams.attribute(layer.block.experts, "moe_config.hidden_dim", seams.MOE_RUNNER.name))
    num_experts = int(seams.attribute(routed, "global_num_experts", seams.MOE_RUNNER.name))
    run = _selecting(layer, routed, num_experts) if routed.quant_method.is_monolithic else _selected(routed)

    def experts(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        # Some kernels want their input padded, as vLLM does before it calls them.
        return run(functional.pad(hidden, (0, kernel_width - width)), ids, gates)[:, :width]

    return experts


def _selecting(layer: MoeLayer, routed: Any, num_experts: int) -> _Run:
    """A kernel that selects by logits: it is given such as leave it no choice, and told how many to select."""
    kernel: Any = seams.attribute(routed, "quant_method.moe_kernel.impl.fused_experts", seams.SELECTING_KERNEL.name)
    if not isinstance(getattr(kernel, "topk", None), int):
        raise RefusedError(f"{layer.name}: --softprune-stats: {type(kernel).__name__} is not told how many experts to select")

    def run(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        logits = leaving_no_choice(ids, gates, num_experts, hidden.dtype)
        served, kernel.topk = kernel.topk, ids.shape[1]
        try:
            output: torch.Tensor = routed.forward_monolithic(x=hidden, router_logits=logits)
        finally:
            kernel.topk = served
        return output

    return run


def _selected(routed: Any) -> _Run:
    """Kernels that are given the selection."""

    def run(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        dtype = routed.quant_method.topk_indices_dtype or torch.int32
        output: torch.Tensor = routed.forward_modular(x=hidden.contiguous(), topk_weights=gates, topk_ids=ids.to(dtype))
        return output

    return run
