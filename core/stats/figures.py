"""Ratios and comparisons computed from sums; none of them is stored.

Arrays hold experts on the last axis unless said otherwise. Where nothing was counted, a ratio is NaN, never 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]


def ratio(numerator: Array, denominator: Array) -> Floats:
    """Quotient by element; NaN where the denominator is 0.

    Mean gates (gate_sum / count), REAP means (gate_norm_sum / count, metrics.md 3.2 and 4) and means over tokens are such.
    """
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    out: Floats = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=out, where=bottom != 0)
    return out


def shares(mass: Array) -> Floats:
    """Each expert's share of its layer's sum."""
    return ratio(mass, mass.sum(-1, keepdims=True))


def effective_number(mass: Array) -> Floats:
    """Effective number of experts, (sum m)^2 / sum m^2 (inverse Simpson, metrics.md 3.5); 0 where nothing was counted."""
    mass = np.asarray(mass, np.float64)
    return np.nan_to_num(ratio(mass.sum(-1) ** 2, (mass**2).sum(-1)))


def concentration(mass: Array) -> Floats:
    """Entry n-1: share of the n experts that have most; the curve ends at 1."""
    return np.asarray(np.cumsum(-np.sort(-shares(mass), -1), -1), np.float64)


def top_share(mass: Array, n: int) -> Floats:
    """Share of the n experts that have most; all of it where n is their number or more."""
    return np.asarray(concentration(mass)[..., min(n, mass.shape[-1]) - 1], np.float64)


def ranking(mass: Array) -> NDArray[np.int64]:
    """Expert ids by falling mass; equal ones by id (metrics.md 3.3)."""
    return np.argsort(-np.asarray(mass), axis=-1, kind="stable")


def overlap(a: Array, b: Array, n: int) -> Floats:
    """Share of a's top n that is in b's top n."""
    tops = []
    for mass in (a, b):
        chosen = np.zeros(mass.shape, bool)
        np.put_along_axis(chosen, ranking(mass)[..., :n], True, -1)
        tops.append(chosen)
    return np.asarray((tops[0] & tops[1]).sum(-1) / n, np.float64)


def rank_correlation(a: Array, b: Array) -> Floats:
    """Spearman's rho along the last axis, equal values sharing their mean rank; NaN where all values of one are equal."""

    def centred(mass: Array) -> Floats:
        smaller = (mass[..., :, None] > mass[..., None, :]).sum(-1)
        equal = (mass[..., :, None] == mass[..., None, :]).sum(-1)
        rank = smaller + (equal + 1) / 2
        return np.asarray(rank - rank.mean(-1, keepdims=True), np.float64)

    x, y = centred(np.asarray(a)), centred(np.asarray(b))
    return ratio((x * y).sum(-1), np.sqrt((x**2).sum(-1) * (y**2).sum(-1)))


def js_divergence(a: Array, b: Array) -> Floats:
    """Jensen-Shannon divergence in nats of two arrays of counts; between 0 and ln 2 (metrics.md 2).

    NaN where one has no counts at all: the study's 0 would call it equal to everything.
    """
    p, q = shares(a), shares(b)
    middle = (p + q) / 2

    def kl(x: Floats) -> Floats:
        quotient = np.where(x > 0, x, 1) / np.where(x > 0, middle, 1)
        return np.asarray((x * np.log(quotient)).sum(-1), np.float64)

    return (kl(p) + kl(q)) / 2


def perplexity(nll_sum: Array, tokens: Array) -> Floats:
    """exp(min(30, mean negative log-likelihood in nats)) (metrics.md 1.6)."""
    return np.asarray(np.exp(np.minimum(30.0, ratio(nll_sum, tokens))), np.float64)


def quantile(histogram: Array, edges: Array, q: float) -> float:
    """Upper edge of the first bin by which a share q of the counts is reached, without interpolation (metrics.md 1.6).

    Args:
        histogram: counts [bins].
        edges: [bins + 1], ascending.
        q: from 0 to 1. Of an empty histogram, the first edge is returned.
    """
    total = histogram.sum()
    if total == 0:
        return float(edges[0])
    return float(edges[1:][np.argmax(np.cumsum(histogram) >= q * total)])
