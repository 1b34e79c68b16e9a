"""Which tokens are sampled: one of every N that are routed, at a random place among them.

Steps of many tokens are sampled in two stages: one of them in `LARGE_STEPS`, at random, and of its tokens that many times as many. A
token's chance is 1 in N either way. Experts read all their weights however few rows they are run on, so that half as many steps with twice
the rows cost less.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

LARGE_STEPS = 2
_DRAWN_AT_ONCE = 256
"""Windows whose places are drawn together."""


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
        self._large_steps = math.gcd(every, LARGE_STEPS)
        self._turn, self._chosen = 0, 0

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

    def of_large(self, rows: int) -> NDArray[np.int64]:
        """`of`, for a step of many tokens: none of most, and of the others exactly one in each whole window of the step."""
        if self._turn == 0:
            self._chosen = int(self._rng.integers(self._large_steps))
        chosen, self._turn = self._turn == self._chosen, (self._turn + 1) % self._large_steps
        if not chosen:
            return np.empty(0, np.int64)
        every = self.every // self._large_steps
        starts = np.arange(0, rows, every)
        places = starts + self._rng.integers(every, size=len(starts))
        return places[places < rows]

    def some(self, rows: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """So many of these rows, at random, ascending."""
        return np.sort(self._rng.choice(rows, number, replace=False))
