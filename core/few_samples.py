"""Bootstrap intervals of few samples are too narrow; by how much."""

from __future__ import annotations

import math

LEAST = 3
"""Samples below which no factor is told."""
_Z = 1.960
# Two-sided 95 % quantiles of Student's t, by degrees of freedom from 2.
_T = (
    4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip


def widening(n: int) -> float:
    """What the distances of a 95 % bootstrap interval's ends are to be multiplied by: t(n - 1) / z x sqrt(n / (n - 1)).

    As for a mean of n values (the expansion of Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 5.3).

    Args:
        n: what was drawn independently, at least LEAST; 1.29 of 8, 1.003 of 512.

    Raises:
        ValueError: fewer.
    """
    if n < LEAST:
        raise ValueError(f"no interval of {n} samples; at least {LEAST}")
    # Beyond the table, t by the first term of its expansion in 1 / degrees of freedom: 0.003 too small at 31, less after that.
    t = _T[n - LEAST] if n - LEAST < len(_T) else _Z + (_Z**3 + _Z) / (4 * (n - 1))
    return t / _Z * math.sqrt(n / (n - 1))
