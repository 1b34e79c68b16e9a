"""AdamW on float32 weights that a BF16 model is refreshed from, its experts as MXFP4 would store them if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from softprune.bench.tiny.weights import is_experts
from softprune.checkpoint.mxfp4 import round_trip

BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 0.1, 1.0
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Masters:
    """The weights that are trained.

    Gradients are those at the rounded weights, taken as if rounding were the identity (a straight-through estimator).

    Args:
        model: float32; its parameters become copies.
        learning_rate: of the first step; `step` takes the current one.
        dtype: of the copies.
    """

    def __init__(self, model: Any, learning_rate: float, dtype: torch.dtype = torch.bfloat16) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.model = model.to(dtype)
        self._copies = dict(self.model.named_parameters())
        matrices = [weight for weight in self.weights.values() if weight.dim() > 1]
        vectors = [weight for weight in self.weights.values() if weight.dim() == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)
        for weight in self.weights.values():
            weight.grad = torch.zeros_like(weight)

    @torch.no_grad()
    def refresh(self, mxfp4: bool) -> None:
        """Give the model the current weights in BF16; with `mxfp4`, its experts as they come out of MXFP4."""
        for name, weight in self.weights.items():
            self._copies[name].copy_(round_trip(weight) if mxfp4 and is_experts(name) else weight.bfloat16())

    def step(self, learning_rate: float) -> None:
        """One step from the model's gradients, which are cleared."""
        for name, weight in self.weights.items():
            copy = self._copies[name]
            assert copy.grad is not None, f"{name} had no part in the loss"
            assert weight.grad is not None
            weight.grad.copy_(copy.grad)
            copy.grad = None
        nn.utils.clip_grad_norm_(self.weights.values(), MAX_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()

    def save(self, path: Path) -> None:
        """Weights and the optimizer's moments, as safetensors."""
        tensors = {f"weight.{name}": weight for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            tensors.update({f"{moment}.{name}": self._optimizer.state[weight][moment] for moment in _MOMENTS})
        part = path.with_suffix(".part")
        save_file(tensors, part)
        part.rename(path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        device = next(iter(self.weights.values())).device
        tensors = load_file(path, device=str(device))
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            self._optimizer.state[weight] = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
