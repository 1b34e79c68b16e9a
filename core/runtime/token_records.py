"""How sure the model was of each token, as records on the device that are fetched many at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.runtime.expert_norms import to_host


@dataclass(frozen=True)
class Fetched:
    """Records on the host, or on their way there.

    Attributes:
        first: number of the first one.
        values: float32 [n, 3], as `token_scores` returns them.
    """

    first: int
    values: torch.Tensor

    def look_up(self, numbers: NDArray[np.int64], into: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Put the scores of those numbers that are here into the rows [len(numbers), 3] of `into`; they have to have arrived.

        Returns:
            bool [len(numbers)]: which are here.
        """
        here = (numbers >= self.first) & (numbers < self.first + len(self.values))
        into[here] = self.values.numpy()[numbers[here] - self.first]
        return here


class TokenRecords:
    """Records, numbered as they come.

    Args:
        room: at most so many between two fetches.
        device: of the logits.

    Attributes:
        used: how many have not been fetched.
    """

    def __init__(self, room: int, device: torch.device | str) -> None:
        self._ring = torch.zeros(room, 3, dtype=torch.float32, device=device)
        self._first, self.used = 0, 0

    @property
    def num_bytes(self) -> int:
        """Of device memory."""
        return self._ring.nbytes

    def add(self, scores: torch.Tensor) -> int | None:
        """Keep scores; the number of the first one, or None if there is no room.

        Args:
            scores: float32 [n, 3].
        """
        if self.used + len(scores) > len(self._ring):
            return None
        self._ring[self.used : self.used + len(scores)].copy_(scores, non_blocking=True)
        self.used += len(scores)
        return self._first + self.used - len(scores)

    def fetch(self) -> Fetched:
        """Send what there is to the host; its room is free at once, since all of it is on one stream."""
        fetched = Fetched(self._first, to_host(self._ring[: self.used]))
        self._first, self.used = self._first + self.used, 0
        return fetched
