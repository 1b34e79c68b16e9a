"""Running chosen ones of SGLang's experts, by the kernels and on the weights that serve: for the norms of their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from softprune.runtime.blocks import MoeLayer
from softprune.runtime.expert_norms import Experts, leaving_no_choice
from softprune.sglang_ext import seams


def experts_of(layers: Sequence[MoeLayer], num_experts: int) -> Experts:
    """The experts of a model's layers.

    Args:
        layers: in order.
        num_experts: of each.

    Raises:
        SeamError: a layer does not look as expected.
    """
    blocks: list[tuple[Any, Any, Any]] = []
    for layer in layers:
        topk = layer.block.topk
        blocks.append((topk, seams.attribute(topk, "topk_config", seams.TOP_K.name), layer.block.experts))

    def run(layer: int, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        topk, config, experts = blocks[layer]
        logits = leaving_no_choice(ids, gates, num_experts, hidden.dtype)
        served, config.top_k = config.top_k, ids.shape[1]
        try:
            # Past the module's hooks, among which is the route probe's.
            selected = topk.forward(hidden, logits)
        finally:
            config.top_k = served
        output: torch.Tensor = experts.forward(hidden, selected)
        return output[:, : hidden.shape[1]]

    return run
