"""Masking routers through their bias: a pruned expert's becomes -inf, in place.

Any top-k then passes it over, the softmax over the chosen ones is that of the kept experts alone,
and nothing is added to the decode path. The tensor's address does not change, so CUDA graphs
captured before or after stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    """The routers of a model in layer order, the biases they were loaded with, and the mask in force.

    A switch has two parts, so that several processes can agree between them: `stage` computes, `commit` copies.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        """Remember the biases as they are now; build it before any mask is applied."""
        self.routers = list(routers)
        self.mask: ExpertMask | None = None
        self._staged: tuple[ExpertMask | None, torch.Tensor] | None = None
        self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """Take the biases as they are now for the loaded ones; after a reload, while no mask is in force."""
        self.loaded = torch.stack([router.bias.detach() for router in self.routers])

    @torch.no_grad()
    def stage(self, mask: ExpertMask | None) -> None:
        """Compute the biases under a mask (None: as loaded), [num_layers, num_experts], beside those in force."""
        biases = self.loaded
        if mask is not None:
            pruned = torch.zeros(biases.shape, dtype=torch.bool)
            for layer, row in enumerate(pruned):
                row[mask.pruned(layer)] = True
            if biases.is_cuda:
                pruned = pruned.pin_memory()  # else the host would wait for the steps in flight
            biases = biases.masked_fill(pruned.to(biases.device, non_blocking=True), float("-inf"))
        self._staged = mask, biases

    @torch.no_grad()
    def commit(self) -> None:
        """Put in force what was staged: one copy into the tensors that the engine reads, on the current stream."""
        if self._staged is None:
            raise RuntimeError("no mask is staged")
        mask, biases = self._staged
        torch._foreach_copy_([router.bias for router in self.routers], list(biases.unbind()))
        self.mask, self._staged = mask, None

    def drop(self) -> None:
        """Forget what was staged."""
        self._staged = None

    def apply(self, mask: ExpertMask | None) -> None:
        """Put a mask in force, in place; None restores exactly the biases that were loaded, and a mask before leaves no trace."""
        self.stage(mask)
        self.commit()

    @contextmanager
    def unmasked(self, layer: int) -> Iterator[None]:
        """One layer's bias as it was loaded, for what runs on the current stream within the block; between two steps or within one."""
        bias = self.routers[layer].bias
        with torch.no_grad():
            now = bias.clone()
            bias.copy_(self.loaded[layer])
            try:
                yield
            finally:
                bias.copy_(now)

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
