"""Which tokens are sampled: one of every N that are routed, at a random place among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DRAWN_AT_ONCE = 256
"""Windows whose places are drawn together."""


@dataclass(frozen=True)
class Settings:
    """How one collection samples.

    Attributes:
        mode: "router" (then only shadow counts are sampled), "reap" or "eaft".
        sample: N of 1 token in N.
        shadow: also count what the router would choose without a mask.
        attribution: see `softprune.stats.header.Eaft`.
    """

    mode: str = "router"
    sample: int = 16
    shadow: bool = False
    attribution: str = "predictor"

    @property
    def samples(self) -> bool:
        """Whether any row is sampled at all."""
        return self.mode != "router" or self.shadow


class Sampling:
    """Exactly one token of each window of N consecutive ones; a fixed stride would always hit the same requests of a batch.

    Args:
        every: N, from 1.
        seed: of the places.
    """

    def __init__(self, every: int, seed: int = 0) -> None:
        self.every = every
        self._rng = np.random.default_rng(seed)
        self._seen, self._windows = 0, 0
        self._places = np.empty(0, np.int64)

    def of(self, rows: int) -> NDArray[np.int64]:
        """Rows of the next step that are sampled, ascending.

        Args:
            rows: of the step.
        """
        end = self._seen + rows
        while self._windows * self.every < end:
            windows = np.arange(self._windows, self._windows + max(_DRAWN_AT_ONCE, rows // self.every + 1))
            self._places = np.append(self._places, windows * self.every + self._rng.integers(self.every, size=len(windows)))
            self._windows = int(windows[-1]) + 1
        taken = int(np.searchsorted(self._places, end))
        found, self._places = self._places[:taken] - self._seen, self._places[taken:]
        self._seen = end
        return found

    def some(self, rows: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """So many of these rows, at random, ascending."""
        return np.sort(self._rng.choice(rows, number, replace=False))
