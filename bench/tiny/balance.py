"""The load-balancing loss of routers, read off them while a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Balance:
    """Collects, in every forward pass, each router's E * sum over experts of (share of selections) * (mean probability).

    This is the loss of Switch Transformers (arXiv 2101.03961, section 2.2) for each layer by itself, 1 if all experts are used alike;
    Transformers' own adds the layers up first, so that layers may be uneven against each other.
    """

    def __init__(self, model: Any) -> None:
        self._losses: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.router.register_forward_hook(self._seen)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean loss over the layers, selections float32 [num_layers, num_experts]) of the forward pass since the last call."""
        losses, counts = torch.stack(self._losses), torch.stack(self._counts)
        self._losses, self._counts = [], []
        return losses.mean(), counts

    def _seen(self, module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        logits, _, chosen = output
        experts = logits.shape[-1]
        selected = chosen.flatten()
        counts = torch.zeros(experts, device=logits.device).scatter_add_(0, selected, torch.ones_like(selected, dtype=torch.float32))
        self._losses.append(experts * (counts / counts.sum() * logits.float().softmax(-1).mean(0)).sum())
        self._counts.append(counts)
