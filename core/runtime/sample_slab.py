"""Sampled tokens on their way through a step: what each MoE layer was given, and its router's logits, kept for later.

A captured graph holds one small kernel in each layer, which copies the rows that a tensor at a fixed address names, and none if it names
none. What is computed with the rows comes later, between two steps and for many of them together.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

SLAB_ROWS = 192
"""Rows that are kept before something has to be done with them, of one step or of several: 27 MB of the 20B shape."""
STEP_ROWS = 64
"""Rows of one step beyond which they are measured within it, where it is no captured graph anyway: 1 in 16 of 1,024 tokens."""
_NOWHERE = -1


class SampleSlab:
    """Room for sampled rows of all layers.

    Args:
        num_layers, num_experts, hidden_size: of the model.
        device, dtype: of the MoE layers' input and of the routers' logits.

    Attributes:
        hidden: [num_layers, SLAB_ROWS, hidden_size], inputs of the MoE layers.
        logits: [num_layers, SLAB_ROWS, num_experts].
        used: rows kept since the last `clear`.
    """

    def __init__(self, num_layers: int, num_experts: int, hidden_size: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.hidden = torch.zeros(num_layers, SLAB_ROWS, hidden_size, dtype=dtype, device=device)
        self.logits = torch.zeros(num_layers, SLAB_ROWS, num_experts, dtype=dtype, device=device)
        self._moves = torch.full((2, SLAB_ROWS), _NOWHERE, dtype=torch.int32, device=device)
        self._idle = True
        self.used = 0

    @property
    def num_bytes(self) -> int:
        """Of device memory."""
        return self.hidden.nbytes + self.logits.nbytes + self._moves.nbytes

    def has_room(self, rows: int) -> bool:
        """For so many more rows."""
        return self.used + rows <= SLAB_ROWS

    def describe(self, rows: NDArray[np.int64]) -> None:
        """Say which rows of the next step to keep, on the current stream and without waiting for it.

        Args:
            rows: as many as there is room for; they take the places from `used` on.
        """
        if not len(rows) and self._idle:
            return
        moves = np.full((2, SLAB_ROWS), _NOWHERE, np.int32)
        moves[0, : len(rows)], moves[1, : len(rows)] = rows, np.arange(self.used, self.used + len(rows))
        described = torch.from_numpy(moves)
        if self._moves.is_cuda:
            described = described.pin_memory()  # its memory is not used again before the copy is done
        self._moves.copy_(described, non_blocking=True)
        self.used += len(rows)
        self._idle = not len(rows)

    def take(self, layer: int, hidden: torch.Tensor, logits: torch.Tensor, copy_to: torch.Tensor | None = None) -> None:
        """Keep a layer's rows: on a GPU one kernel, elsewhere plain PyTorch.

        Args:
            layer: position among the MoE layers.
            hidden: [rows, at least hidden_size], contiguous rows; columns beyond are the engine's padding.
            logits: [rows, num_experts].
            copy_to: [at most rows, num_experts], with rows side by side; the logits are copied there as well.
        """
        if hidden.is_cuda:
            from softprune.runtime import sample_slab_kernel

            sample_slab_kernel.take(self, layer, hidden, logits, copy_to)
        else:
            self.reference(layer, hidden, logits, copy_to)

    def reference(self, layer: int, hidden: torch.Tensor, logits: torch.Tensor, copy_to: torch.Tensor | None = None) -> None:
        """`take` in PyTorch; what the kernel is compared with."""
        if copy_to is not None:
            copy_to.copy_(logits[: len(copy_to)])
        source, target = self._moves[:, : min(len(hidden), SLAB_ROWS)].long()
        kept = (target != _NOWHERE) & (source < len(hidden))
        self.hidden[layer, target[kept]] = hidden[source[kept], : self.hidden.shape[-1]]
        self.logits[layer, target[kept]] = logits[source[kept]]

    def clear(self) -> None:
        """Begin again at the first place."""
        self.used = 0

    @property
    def moves(self) -> torch.Tensor:
        """int32 [2, SLAB_ROWS]: rows of the step, and the places that they go to; -1 for none."""
        return self._moves
