"""The (p, H) grid of `eaft.grid_…`: its default edges, and which bin a value falls into.

The edges stand close where the study's thresholds can fall. Its p_lo and h_lo are 15 % quantiles (spec/metrics.md 3.1: 0.018 and
0.023 for gpt-oss-20b); a model that is surer of its text has p_lo near 1 and h_lo far below 0.01, so that bins narrow towards both
ends of p, and towards H = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.stats.header import Grid

_P = (1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.6, 0.8, 0.9, 0.97, 0.99, 0.999)
_H = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.6, 0.75, 0.9)
DEFAULT_GRID = Grid(log10_p=[-8.0, *(round(float(np.log10(p)), 6) for p in _P), 0.0], entropy=[0.0, *_H, 1.0])
"""17 bins of log10 p by 16 of H (top 20 over ln 20)."""


def bin_of(values: NDArray[Any], edges: Sequence[float] | NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the bin [e_i, e_i+1) of each value; what lies outside falls into the outermost bins (spec/metrics.md 1.4 and 1.5)."""
    found = np.searchsorted(np.asarray(edges, np.float64), values, "right") - 1
    return np.clip(found, 0, len(edges) - 2).astype(np.int64)
