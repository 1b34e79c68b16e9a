"""Noise as benchmarks meet it: a speed that drifts (AR(1)), a little of its own in each pass, and now and then a pass that stalls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Noise:
    """Of the logarithm of a pass's speed.

    Attributes:
        drift, memory: standard deviation of the part that drifts, and how much of it is left at the next pass.
        own: standard deviation of each pass's own part.
        slow: share of passes that stall; they lose 5 to 40 % of their speed.
        trend: added with every pass, as where a machine grows warm.
    """

    drift: float = 0.015
    memory: float = 0.9
    own: float = 0.005
    slow: float = 0.05
    trend: float = 0.0

    def factors(self, seed: int) -> Iterator[float]:
        """Speed of one pass after the other, as a factor around 1."""
        rng = np.random.default_rng(seed)
        state, number = rng.normal(0, self.drift), 0
        while True:
            stall = rng.uniform(0.05, 0.4) if rng.random() < self.slow else 0.0
            yield float(np.exp(state + rng.normal(0, self.own) + self.trend * number - stall))
            state = self.memory * state + rng.normal(0, self.drift * np.sqrt(1 - self.memory**2))
            number += 1
