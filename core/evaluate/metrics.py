"""Metrics of scored completion tokens, block by block in bounded memory (spec/metrics.md 1.4 to 1.6).

Of each token two bytes stay, its cell of the plane, so that intervals can be had later without a model; all else are sums by block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.evaluate.errors import EvaluationError
from softprune.evaluate.plane import Plane, Scale, confident_conflict, encode_cells, quantile

MAX_MEAN_NLL = 30.0
"""Perplexity is cut at exp of this (spec/metrics.md 1.6)."""
SHOWN_QUANTILES = (0.05, 0.5, 0.95)
_ROUNDING = 1e-3
"""How far a log-probability or an entropy may lie outside its range; more is no rounding."""


@dataclass(frozen=True)
class MetricSettings:
    """What two evaluations must share to be compared.

    Attributes:
        entropy_topk: tokens whose entropy is H.
        cc_quantile: share of the tokens below either threshold of confident conflict.
        prob_scale, logp_min, logp_max, xbins, ybins: of the plane.
        sample_points: tokens that the file keeps for scatter plots.
        seed: of their choice.
    """

    entropy_topk: int = 20
    cc_quantile: float = 0.15
    prob_scale: Scale = "linear"
    logp_min: float = -12.0
    logp_max: float = 0.0
    xbins: int = 160
    ybins: int = 120
    sample_points: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        # A token's cell is kept as a 16-bit number.
        if not 1 <= self.xbins * self.ybins <= 1 << 16 or min(self.xbins, self.ybins) < 1:
            raise EvaluationError(f"found a plane of {self.xbins} x {self.ybins} bins; expected from 1 to 65536 cells")
        if self.prob_scale not in ("linear", "log"):
            raise EvaluationError(f"prob_scale: found {self.prob_scale!r}; expected linear or log")
        if not self.logp_min < self.logp_max <= 0:
            raise EvaluationError(f"logp_min, logp_max: found {self.logp_min}, {self.logp_max}; expected log10 p, ascending, at most 0")
        if not 0 < self.cc_quantile < 1:
            raise EvaluationError(f"cc_quantile: found {self.cc_quantile}; expected a share between 0 and 1")
        if self.entropy_topk < 2 or self.sample_points < 0:
            found = f"{self.entropy_topk}, {self.sample_points}"
            raise EvaluationError(f"entropy_topk, sample_points: found {found}; expected at least 2, and at least 0")

    @property
    def plane(self) -> Plane:
        """The axes of the planes."""
        return Plane(self.xbins, self.ybins, self.prob_scale, self.logp_min, self.logp_max)


@dataclass
class _Reservoir:
    """Algorithm R: a uniform sample of a stream of unknown length, the same for the same stream however it is cut."""

    capacity: int
    rng: np.random.Generator
    points: NDArray[np.float64]
    seen: int = 0

    def add(self, points: NDArray[np.float64]) -> None:
        fill = min(len(points), max(0, self.capacity - self.seen))
        self.points[self.seen : self.seen + fill] = points[:fill]
        later = points[fill:]
        if len(later) and self.capacity:
            drawn = self.rng.integers(0, np.arange(self.seen + fill + 1, self.seen + len(points) + 1))
            # Of two tokens that fall on one place the later stays, which a loop over them does by itself.
            for at in np.flatnonzero(drawn < self.capacity):
                self.points[drawn[at]] = later[at]
        self.seen += len(points)

    @property
    def kept(self) -> NDArray[np.float64]:
        return self.points[: min(self.seen, self.capacity)]


@dataclass
class Accumulator:
    """Takes blocks in order and gives one cell of an evaluation file: one pack at one block length."""

    settings: MetricSettings
    _tokens: list[int] = field(default_factory=list, init=False)
    _sums: list[tuple[float, float, float, float]] = field(default_factory=list, init=False)
    _cells: list[NDArray[np.uint16]] = field(default_factory=list, init=False)
    _reservoir: _Reservoir = field(init=False)

    def __post_init__(self) -> None:
        capacity = self.settings.sample_points
        self._reservoir = _Reservoir(capacity, np.random.default_rng(self.settings.seed), np.empty((capacity, 2)))

    def add_block(self, log_p: NDArray[np.float32], entropy: NDArray[np.float32]) -> None:
        """Add one block's scored completion tokens, in order; a block may have none.

        Args:
            log_p: [n], natural log-probability of the reference token.
            entropy: [n], of the top tokens, renormalised, over the logarithm of their number (spec/metrics.md 1.4).

        Raises:
            EvaluationError: a value that is not finite, or outside its range by more than rounding.
        """
        at = f"block {len(self._tokens)}"
        if log_p.ndim != 1 or log_p.shape != entropy.shape:
            raise EvaluationError(f"{at}: found log p of shape {log_p.shape} and H of {entropy.shape}; expected one of each token")
        for name, values, low, high in (("log p", log_p, -math.inf, 0.0), ("H", entropy, 0.0, 1.0)):
            if not np.isfinite(values).all():
                raise EvaluationError(f"{at}: {name} of {int((~np.isfinite(values)).sum())} of {values.size} tokens is not finite")
            if values.size and (values.min() < low - _ROUNDING or values.max() > high + _ROUNDING):
                raise EvaluationError(f"{at}: found {name} from {values.min():g} to {values.max():g}; expected {low:g} to {high:g}")
        log = np.minimum(log_p.astype(np.float64), 0.0)
        p, plane = np.exp(log), self.settings.plane
        x, height = plane.x_of(p), np.clip(entropy.astype(np.float64), 0.0, 1.0)
        self._tokens.append(len(log))
        self._sums.append((float(-log.sum()), float((log**2).sum()), float(p.sum()), float(height.sum())))
        self._cells.append(plane.cells_of(x, height))
        self._reservoir.add(np.column_stack([x, height]))

    def cell(self) -> dict[str, Any]:
        """The metrics, in the study's names (M of spec/metrics.md 1.7), with sums by block and the tokens' cells under "softprune".

        `tok_s_pred` is None: only who ran the model knows the time.

        Raises:
            EvaluationError: no token was added.
        """
        number = sum(self._tokens)
        if not number:
            raise EvaluationError("no completion tokens: no message of the assistant lies in these blocks")
        settings, plane = self.settings, self.settings.plane
        cells = np.concatenate(self._cells)
        counts = np.bincount(cells, minlength=plane.xbins * plane.ybins).reshape(plane.xbins, plane.ybins)
        hist_x, hist_h = counts.sum(1), counts.sum(0)
        x_thr, h_thr = (quantile(hist, edges, settings.cc_quantile) for hist, edges in ((hist_x, plane.x_edges), (hist_h, plane.y_edges)))
        quadrants = confident_conflict(counts, plane.low_bins(x_thr, h_thr))
        sums = np.asarray(self._sums)
        mean_nll, mean_square, mean_prob, mean_entropy = (float(mean) for mean in sums.sum(0) / number)
        low, high = plane.x_range
        return {
            "ppl": math.exp(min(MAX_MEAN_NLL, mean_nll)), "kept_tokens": number, "tok_s_pred": None, "mean_prob": mean_prob,
            "mean_entropy": mean_entropy, "mean_nll": mean_nll, "var_nll": max(0.0, mean_square - mean_nll**2),
            "p_thr": plane.p_of(x_thr), "h_thr": h_thr, "x_thr": x_thr,
            **{f"p_q{q * 100:02.0f}": plane.p_of(quantile(hist_x, plane.x_edges, q)) for q in SHOWN_QUANTILES},
            **{f"h_q{q * 100:02.0f}": quantile(hist_h, plane.y_edges, q) for q in SHOWN_QUANTILES},
            "cc_rate": quadrants["LL"] / number, "cc_count": quadrants["LL"], "quadrants": quadrants,
            "hist2d_x_H": {
                "x_edges": plane.x_edges.tolist(), "y_edges": plane.y_edges.tolist(), "counts": counts.reshape(-1).tolist(),
                "xbins": plane.xbins, "ybins": plane.ybins,
            },
            "hist1d_x": {"edges": plane.x_edges.tolist(), "counts": hist_x.tolist()},
            "hist1d_H": {"edges": plane.y_edges.tolist(), "counts": hist_h.tolist()},
            "samples": self._reservoir.kept.tolist(), "x_scale": plane.scale, "x_min": low, "x_max": high,
            "softprune": {"blocks": {
                "tokens": self._tokens, "nll": sums[:, 0].tolist(), "p": sums[:, 2].tolist(), "entropy": sums[:, 3].tolist(),
                "cells": encode_cells(cells),
            }},
        }  # fmt: skip
