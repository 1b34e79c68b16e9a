"""Masking routers through their bias: a pruned expert's becomes -inf, in place.

Any top-k then passes it over, the softmax over the chosen ones is that of the kept experts alone,
and nothing is added to the decode path. The tensor's address does not change, so CUDA graphs
captured before or after stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from softprune.errors import RefusedError
from softprune.mask import ExpertMask


@dataclass(frozen=True)
class Router:
    """One MoE layer's router in a loaded model.

    Attributes:
        name: the module's name in the model, for messages.
        bias: [num_experts], the tensor that the engine reads in each step.
        forward: the router as the engine calls it, [n, hidden] -> logits [n, num_experts].
    """

    name: str
    bias: torch.Tensor
    forward: Callable[[torch.Tensor], torch.Tensor]


class RouterMask:
    """The routers of a model in layer order, the biases they were loaded with, and the mask in force."""

    def __init__(self, routers: Sequence[Router]) -> None:
        """Remember the biases as they are now; build it before any mask is applied."""
        self.routers = list(routers)
        self.mask: ExpertMask | None = None
        self.remember()

    @torch.no_grad()
    def apply(self, mask: ExpertMask) -> None:
        """Put a mask in force, in place; a mask before it leaves no trace."""
        for layer, (router, loaded) in enumerate(zip(self.routers, self.loaded, strict=True)):
            pruned = torch.tensor(mask.pruned(layer), dtype=torch.long, device=loaded.device)
            router.bias.copy_(loaded.index_fill(0, pruned, float("-inf")))
        self.mask = mask

    def remember(self) -> None:
        """Take the biases as they are now for the loaded ones; after a reload, while no mask is in force."""
        self.loaded = [router.bias.detach().clone() for router in self.routers]

    @torch.no_grad()
    def remove(self) -> None:
        """Restore exactly the biases that were loaded."""
        for router, loaded in zip(self.routers, self.loaded, strict=True):
            router.bias.copy_(loaded)
        self.mask = None

    @torch.no_grad()
    def verify(self, hidden: int, dtype: torch.dtype) -> None:
        """Run every router once as the engine does and see that it obeys.

        This catches what no list of versions can: a router whose kernel ignores the bias, or holds a copy.

        Args:
            hidden: width of the router's input.
            dtype: its dtype.

        Raises:
            RefusedError: a pruned expert's logit is not -inf, or a kept one's is not finite.
        """
        generator = torch.Generator().manual_seed(0)
        # A decode step and a prefill step may run different kernels.
        samples = [torch.randn(rows, hidden, generator=generator).to(dtype) for rows in (4, 256)]
        for layer, router in enumerate(self.routers):
            logits = torch.cat([router.forward(sample.to(router.bias.device)) for sample in samples]).float()
            pruned = set(self.mask.pruned(layer)) if self.mask else set()
            expected = torch.tensor([i in pruned for i in range(logits.shape[-1])], device=logits.device)
            wrong = (torch.isneginf(logits) != expected).any(0) | logits.isnan().any(0) | torch.isposinf(logits).any(0)
            if wrong.any():
                expert = int(wrong.nonzero()[0])
                state = "pruned" if expert in pruned else "kept"
                raise RefusedError(
                    f"{router.name}: found logits {[round(x, 3) for x in logits[:4, expert].tolist()]} for {state} expert {expert}; "
                    f"expected {'-inf' if state == 'pruned' else 'finite numbers'}. The router does not obey its bias."
                )
