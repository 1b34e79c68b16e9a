"""EAFT's regions on the (p, H) grid: how much of each cell lies in which, and what it weighs.

Two rules (spec/metrics.md 3.1). `code` made every number of the study:
    good       p >= p_lo and H <= h_lo
    conflict   p <  p_lo and H <= h_lo
    uncertain  all else, that is H > h_lo; h_hi is not used
`policy` is what the study's policy document says:
    conflict   p <= p_lo and H <= h_lo
    uncertain  p <= p_lo and H >= h_hi
    good       all else

A threshold is a quantile, or given. It falls inside a bin of each axis; what share of that bin's tokens lies below is known
exactly for a quantile (its rank minus the ranks of the bin's edges), and taken to be the same in all cells of the bin. A given threshold
is turned into its rank first, tokens being spread evenly over a bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Rule = Literal["code", "policy"]
REGIONS = ("good", "uncertain", "conflict")


@dataclass(frozen=True)
class Axis:
    """Tokens along one axis of the grid.

    Attributes:
        edges: ascending, [bins + 1].
        tokens: [bins], not all 0.
    """

    edges: Values
    tokens: Values

    @property
    def ranks(self) -> Values:
        """Share of the tokens below each edge."""
        return np.concatenate([[0.0], np.cumsum(self.tokens) / self.tokens.sum()])

    def threshold(self, quantile: float) -> float:
        """Where a quantile lies, tokens being spread evenly over a bin."""
        ranks = self.ranks
        bin_ = int(np.clip(np.searchsorted(ranks, quantile, "left") - 1, 0, len(self.tokens) - 1))
        share = (quantile - ranks[bin_]) / max(ranks[bin_ + 1] - ranks[bin_], 1e-300)
        return float(self.edges[bin_] + min(share, 1.0) * (self.edges[bin_ + 1] - self.edges[bin_]))

    def quantile(self, threshold: float) -> float:
        """The rank of a threshold."""
        return float(np.interp(threshold, self.edges, self.ranks))

    def below(self, quantile: float) -> Values:
        """Share of each bin's tokens below a quantile, [bins]."""
        ranks = self.ranks
        width = np.diff(ranks)
        inside = np.divide(quantile - ranks[:-1], width, out=np.where(ranks[:-1] < quantile, 1.0, 0.0), where=width > 0)
        return np.asarray(np.clip(inside, 0.0, 1.0), np.float64)


def shares(rule: Rule, p_below: Values, h_low: Values, h_high: Values) -> dict[str, Values]:
    """Share of each cell that lies in each region, [X, Y]; the three add up to 1.

    Args:
        rule: see above.
        p_below: share of each p bin below p_lo, [X].
        h_low, h_high: share of each H bin up to h_lo, and from h_hi on, [Y].
    """
    low_p, low_h, high_h = p_below[:, None], h_low[None], h_high[None]
    if rule == "code":
        conflict, uncertain = low_p * low_h, np.broadcast_to(1 - low_h, (len(p_below), len(h_low)))
        return {"good": 1 - conflict - uncertain, "uncertain": np.array(uncertain), "conflict": conflict}
    # Where h_hi is below h_lo, which tiny samples can do, conflict goes first.
    conflict, uncertain = low_p * low_h, low_p * np.minimum(high_h, 1 - low_h)
    return {"good": 1 - conflict - uncertain, "uncertain": uncertain, "conflict": conflict}


def regions(rule: Rule, p: Sequence[Any] | NDArray[Any], h: NDArray[Any], p_lo: float, h_lo: float, h_hi: float) -> NDArray[np.int64]:
    """The region of each token, as an index into `REGIONS`: the rules token by token, which the grid approximates."""
    low_p, values = np.asarray(p), np.asarray(h)
    if rule == "code":
        return np.where(values > h_lo, 1, np.where(low_p >= p_lo, 0, 2))
    return np.where((low_p <= p_lo) & (values <= h_lo), 2, np.where((low_p <= p_lo) & (values >= h_hi), 1, 0))
