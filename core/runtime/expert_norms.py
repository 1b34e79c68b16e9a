"""Norms of experts' outputs, by the engine's own kernels on its own weights.

Fused kernels return a token's sum over its experts. Asked for one expert instead of top_k, they return that expert's output alone, with a
gate of 1: each sampled row is given to them top_k times, once for each expert chosen. Where the outputs can be read on their way into the
sum, see `softprune.runtime.gated_outputs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from softprune.runtime.router_stats import chosen_experts

Experts = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, hidden [n, hidden_size], ids int64 [n, k], gates float32 [n, k]) -> [n, hidden_size]: of each row, the sum of what these experts
make of it, biases included, times their gates, which add up to 1."""


@dataclass(frozen=True)
class Routed:
    """What rows were routed to in one layer or in several.

    Attributes:
        ids: int16 [..., n, top_k], the chosen experts.
        gates: float32, same shape; softmax over the chosen logits.
        norms: float32, same shape, or None; of each chosen expert's output before gating, Euclidean.
        shadow: int16, same shape, or None; what the router would choose without a mask.
    """

    ids: torch.Tensor
    gates: torch.Tensor
    norms: torch.Tensor | None
    shadow: torch.Tensor | None = None

    @classmethod
    def stacked(cls, layers: list[Routed]) -> Routed:
        """Of all layers, in a new first axis."""

        def stack(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            return torch.stack(present) if present else None

        ids, gates = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("ids", "gates"))
        return cls(ids, gates, stack([layer.norms for layer in layers]), stack([layer.shadow for layer in layers]))

    def first(self, rows: int) -> Routed:
        """The first rows, of each layer if there are several."""
        tensors = (None if tensor is None else tensor[..., :rows, :] for tensor in (self.ids, self.gates, self.norms, self.shadow))
        return Routed(*tensors)  # type: ignore[arg-type]

    def ascending(self) -> Routed:
        """The same experts of each row in ascending order."""
        order = self.ids.argsort(-1)
        norms = None if self.norms is None else self.norms.gather(-1, order)
        return Routed(self.ids.gather(-1, order), self.gates.gather(-1, order), norms, self.shadow)

    def to_host(self) -> Routed:
        """Copies on their way to the host, on the current stream."""
        return Routed(*(None if tensor is None else to_host(tensor) for tensor in (self.ids, self.gates, self.norms, self.shadow)))  # type: ignore[arg-type]


def routed(layer: int, hidden: torch.Tensor, logits: torch.Tensor, top_k: int, experts: Experts | None) -> Routed:
    """Route rows as the engine did, and measure what the chosen experts made of them.

    Args:
        layer: position among the MoE layers.
        hidden: [n, hidden_size], the layer's input.
        logits: [n, num_experts], of its router.
        top_k: experts per token.
        experts: the engine's; None leaves norms out.
    """
    ids, gates = chosen_experts(logits.float(), top_k)
    norms = None
    if experts is not None:
        outputs = experts(layer, hidden.repeat_interleave(top_k, 0), ids.reshape(-1, 1), torch.ones_like(gates).reshape(-1, 1))
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32).view_as(gates)
    return Routed(ids.to(torch.int16), gates, norms)


def leaving_no_choice(ids: torch.Tensor, gates: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Router logits by which a kernel that selects k experts a row selects these, with these gates but for rounding.

    Args:
        ids: int64 [n, k].
        gates: float32 [n, k], which add up to 1.
        num_experts: of the layer.
        dtype: of the logits.

    Returns:
        [n, num_experts]: logarithms of the gates where the ids are, -inf elsewhere.
    """
    return torch.full((len(ids), num_experts), -torch.inf, dtype=dtype, device=ids.device).scatter_(1, ids, gates.log().to(dtype))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; on a GPU it arrives when the current stream gets there."""
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
