"""Intervals by bootstrap over blocks: blocks are drawn with replacement, the same ones on both sides, so that differences are paired.

Tokens of one block share their text, so that blocks, and not tokens, are what was drawn independently (Efron and Tibshirani 1993, "An
Introduction to the Bootstrap", chapters 8 and 13: percentile intervals of what was drawn as a whole). Of few blocks they are too narrow (of
8 normal values' mean, they hold it in 89 % of tries), so that their ends are moved away from the value (`softprune.few_samples`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softprune.evaluate.evaluation import BlockSums
from softprune.evaluate.js2d import LEVEL
from softprune.evaluate.metrics import MAX_MEAN_NLL
from softprune.evaluate.plane import Plane, quantile_bin
from softprune.few_samples import widening

DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval; `low` and `high` are None where there are no sums by block, or too few blocks."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, drawn: NDArray[np.float64], num_blocks: int) -> Interval:
        """From its values in all draws, [DRAWS], of so many blocks."""
        low, high = value + (np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - value) * widening(num_blocks)
        return cls(value, float(low), float(high))


def draw_blocks(num_blocks: int, seed: int) -> NDArray[np.float64]:
    """How often each block is in each draw, [DRAWS, num_blocks]."""
    return np.random.default_rng(seed).multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), DRAWS).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Metrics of one side in every draw, each [DRAWS]; `bins` are the two thresholds as bins of x and H, [DRAWS, 2]."""

    ppl: NDArray[np.float64]
    mean_prob: NDArray[np.float64]
    mean_entropy: NDArray[np.float64]
    cc_rate: NDArray[np.float64]
    bins: NDArray[np.int64]

    @classmethod
    def of(cls, blocks: BlockSums, draws: NDArray[np.float64], plane: Plane, cc_quantile: float) -> Drawn:
        """Compute them; thresholds of confident conflict are found anew in each draw.

        Args:
            blocks: of the side.
            draws: from `draw_blocks`.
            plane: the axes.
            cc_quantile: share of the tokens below each threshold.
        """
        number = np.maximum(1, draws @ blocks.tokens)
        ix, iy = np.divmod(blocks.cells.astype(np.int64), plane.ybins)
        bins = [quantile_bin(draws @ _by_block(blocks, index, size), cc_quantile) for index, size in ((ix, plane.xbins), (iy, plane.ybins))]
        thresholds = np.column_stack(bins)
        return cls(
            np.exp(np.minimum(MAX_MEAN_NLL, draws @ blocks.nll / number)), draws @ blocks.p / number, draws @ blocks.entropy / number,
            cc_rates(blocks, draws, plane, thresholds), thresholds,
        )  # fmt: skip


def cc_rates(blocks: BlockSums, draws: NDArray[np.float64], plane: Plane, bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of confident conflicts in each draw, under thresholds given for it, [DRAWS].

    Args:
        blocks, draws, plane: as in `Drawn.of`.
        bins: [DRAWS, 2], the last bins of x and of H that are low.
    """
    ix, iy = np.divmod(blocks.cells.astype(np.int64), plane.ybins)
    found = np.zeros(len(draws))
    # Few pairs of thresholds occur, since draws are alike.
    for x, height in np.unique(bins, axis=0):
        rows = (bins == (x, height)).all(1)
        found[rows] = draws[rows] @ _by_block(blocks, np.zeros_like(ix), 1, (ix <= x) & (iy <= height))[:, 0]
    return np.asarray(found / np.maximum(1, draws @ blocks.tokens), np.float64)


def _by_block(blocks: BlockSums, index: NDArray[np.int64], size: int, where: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """Tokens of each block by their index below `size`, [num_blocks, size]."""
    number = len(blocks.tokens)
    flat = np.repeat(np.arange(number), blocks.tokens) * size + index
    return np.bincount(flat if where is None else flat[where], minlength=number * size).reshape(number, size)
