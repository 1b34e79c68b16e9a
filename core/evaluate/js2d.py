"""JS2D: how far two planes of tokens lie apart, as Jensen-Shannon divergence in nats, and how much of that is only few tokens.

A histogram of N tokens is not the law that they were drawn from, and JS2D sees the difference: two samples of one law are apart by about
(K - 1)/8 (1/N + 1/M), where K cells are occupied and N and M tokens were drawn (second-order expansion; for N = M the (K - 1)/(4N) of
spec/metrics.md 2). That is for independent samples. Base and candidate score the *same* tokens: one that stays in its cell moves both
planes alike and adds nothing, so that the bias of paired tokens runs from 0, if none moved, to about the above:
1/(4N) sum_i (1 - 2 n_ii/(a_i + b_i)), where a_i and b_i tokens are in cell i on each side, and n_ii in it on both.

These expansions hold where cells are well filled, and most are not; so `paired` measures the bias. If the two models were alike, each
block's two sides could be exchanged, and JS2D of planes whose sides were exchanged at random, block by block, would be all bias: the
randomisation of paired samples (Fisher 1935, "The Design of Experiments", section 21). The a_i + b_i and n_ii above stay as they are,
so that models that are not alike have the same bias, to that order. Exchanging also turns 1/B of what is real into bias:

    corrected = (JS2D - mean JS2D of exchanged planes) B/(B - 1)

where B is what the blocks are worth, (sum n)^2 / sum n^2 of their tokens n (Kish 1965, "Survey Sampling", section 11.7): exchanging the
only block that has tokens changes nothing, however many empty ones stand beside it.

It holds at any number of tokens if nothing is real. What is real shows only once cells hold a few tokens, so that with very few the
corrected value lies too low: on the trained small model 7,463 tokens find 0.0099 of the 0.0131 that 115,573 find, while the
raw value falls from 0.0775 to 0.0323 (bench/results/js2d_bias.json). Extrapolating from halves of the blocks, as if the bias went with
1/N, does not hold there.

The interval has two parts. Chance: halves of the blocks, drawn without replacement and corrected in the same way, scatter about the
value of all as that does about the truth (delete-half jackknife; Shao and Wu 1989, "A general theory for jackknife variance
estimation"). And the drift, how far the corrected value itself moves from half of the blocks to all, by which the interval is longer on
the side to which it moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MIN_BLOCKS = 8
"""What blocks must be worth to give an interval: halves of fewer say nothing of their scatter."""
EXCHANGES = 200
"""Random exchanges of all blocks."""
HALVES = 200
HALF_EXCHANGES = 4
"""Random exchanges of each half; their mean's own scatter makes the interval a little wider."""
LEVEL = 0.95
_CHUNK = 1 << 22
"""Numbers of one table that are in memory at once (32 MB)."""


@dataclass(frozen=True)
class Js2d:
    """A divergence, in nats, between 0 and ln 2.

    Attributes:
        raw: of the histograms as they are.
        bias: how much of it is due to few tokens.
        corrected: raw less bias; may fall below 0 by chance.
        low, high: 95 % interval of it, with the drift; None without sums by block, or if the blocks are worth fewer than `MIN_BLOCKS`.
        occupied_cells: cells with a token on either side.
        method: "exchange", measured; "independent", the formula for independent samples, which paired tokens stay below, so that the
            corrected value is a lower bound.
        worth: number of blocks of one size that would say as much as these; None without sums by block.
        density: tokens that moved for each cell that one left or entered; None without sums by block, or if none moved.
    """

    raw: float
    bias: float
    corrected: float
    low: float | None
    high: float | None
    occupied_cells: int
    method: Literal["exchange", "independent"]
    worth: float | None = None
    density: float | None = None


def divergence(a: NDArray[np.floating | np.integer], b: NDArray[np.floating | np.integer]) -> NDArray[np.float64]:
    """Jensen-Shannon divergence of histograms (spec/metrics.md 2); 0 where one of them is empty.

    Args:
        a, b: [..., cells], counts of tokens.

    Returns:
        [...], in nats.
    """
    totals = a.sum(-1, keepdims=True), b.sum(-1, keepdims=True)
    found = _summands(a / np.maximum(1, totals[0]), b / np.maximum(1, totals[1])).sum(-1)
    return np.asarray(np.where((totals[0][..., 0] > 0) & (totals[1][..., 0] > 0), found, 0.0), np.float64)


def _summands(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    middle = np.maximum(1e-12, (p + q) / 2)
    # A share of 0 adds 0; 1 stands in where its logarithm would be taken.
    left, right = (side * np.log(np.where(side > 0, side / middle, 1.0)) for side in (p, q))
    return np.asarray((left + right) / 2, np.float64)


def effective_blocks(tokens: NDArray[np.int64]) -> float:
    """How many blocks of one size say as much as these: (sum n)^2 / sum n^2 (Kish 1965, "Survey Sampling", section 11.7).

    Args:
        tokens: [num_blocks], not all 0.
    """
    return float(tokens.sum()) ** 2 / float((tokens.astype(np.float64) ** 2).sum())


def independent(a: NDArray[np.int64], b: NDArray[np.int64]) -> Js2d:
    """JS2D of two planes of which nothing else is known, with the bias of independent samples.

    Args:
        a, b: [cells], counts of tokens.
    """
    raw, occupied = float(divergence(a, b)), int(((a > 0) | (b > 0)).sum())
    bias = (occupied - 1) / 8 * (1 / int(a.sum()) + 1 / int(b.sum()))
    return Js2d(raw, bias, max(0.0, raw - bias), None, None, occupied, "independent")


def paired(base: NDArray[np.integer], candidate: NDArray[np.integer], tokens: NDArray[np.int64], seed: int = 0) -> Js2d:
    """JS2D of two models' planes of the same tokens, its bias measured by exchanging sides.

    Args:
        base, candidate: [n], the cell of each token, block after block.
        tokens: [num_blocks], tokens of each block; at least `MIN_BLOCKS` blocks with any.
        seed: of exchanges and halves.
    """
    tokens = tokens[tokens > 0]
    worth = effective_blocks(tokens)
    occupied = np.union1d(base, candidate)
    cells = [np.searchsorted(occupied, side) for side in (base, candidate)]
    if not (cells[0] != cells[1]).any():
        return Js2d(0.0, 0.0, 0.0, 0.0, 0.0, len(occupied), "exchange", worth)
    rng, blocks = np.random.default_rng(seed), len(tokens)
    halves = np.zeros((HALVES, blocks))
    np.put_along_axis(halves, rng.permuted(np.tile(np.arange(blocks), (HALVES, 1)), axis=1)[:, : blocks // 2], 1.0, axis=1)
    selections = np.vstack([np.ones(blocks), halves])
    # Of all blocks and of each half: as they are, and with sides exchanged.
    rows = np.concatenate([np.arange(1 + HALVES), np.zeros(EXCHANGES, int), np.repeat(np.arange(1, 1 + HALVES), HALF_EXCHANGES)])
    signs = np.ones((len(rows), blocks))
    signs[1 + HALVES :] = rng.choice([-1.0, 1.0], (len(rows) - 1 - HALVES, blocks))
    values = _divergences(cells, tokens, selections, rows, signs)
    exchanged = values[1 + HALVES + EXCHANGES :].reshape(HALVES, HALF_EXCHANGES).mean(1)
    raw, half = float(values[0]), blocks // 2
    corrected = (raw - float(values[1 + HALVES : 1 + HALVES + EXCHANGES].mean())) * worth / (worth - 1)
    worth_of_halves = (halves @ tokens) ** 2 / (halves @ tokens.astype(np.float64) ** 2)
    of_halves = (values[1 : 1 + HALVES] - exchanged) * worth_of_halves / (worth_of_halves - 1)
    chance = (of_halves - of_halves.mean()) * np.sqrt(half / (blocks - half))
    above, below = np.quantile(chance, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    drift = corrected - float(of_halves.mean())
    low, high = corrected - float(above) + min(0.0, drift), corrected - float(below) + max(0.0, drift)
    moved = cells[0] != cells[1]
    density = int(moved.sum()) / len(np.union1d(cells[0][moved], cells[1][moved]))
    if worth < MIN_BLOCKS:
        return Js2d(raw, raw - corrected, corrected, None, None, len(occupied), "exchange", worth, density)
    return Js2d(raw, raw - corrected, corrected, low, high, len(occupied), "exchange", worth, density)


def _divergences(
    cells: list[NDArray[np.int64]], tokens: NDArray[np.int64], selections: NDArray[np.float64], rows: NDArray[np.int64],
    signs: NDArray[np.float64],
) -> NDArray[np.float64]:  # fmt: skip
    """JS2D of selections of blocks.

    Args:
        cells: of both sides, numbered from 0 without gaps.
        tokens: [num_blocks].
        selections: [selections, num_blocks], 1 where a block is in it.
        rows: [rows], the selection of each row.
        signs: [rows, num_blocks], -1 where a block's sides are exchanged.

    Returns:
        [rows].
    """
    num_blocks, num_cells = len(tokens), 1 + max(int(side.max()) for side in cells)
    # Counts of tokens are exact in float32 up to here, and multiplied twice as quickly.
    dtype = np.float32 if tokens.sum() < 1 << 23 else np.float64
    block, signed = np.repeat(np.arange(num_blocks), tokens), (selections[rows] * signs).astype(dtype)
    count = np.arange(1 + np.bincount(np.concatenate(cells)).max())
    weighed = count * np.log(np.maximum(1, count))
    found, step = np.zeros(len(rows)), max(1, _CHUNK // max(num_blocks, len(rows)))
    for begin in range(0, num_cells, step):
        size = min(step, num_cells - begin)
        one, other = (_by_block(side - begin, block, num_blocks, size) for side in cells)
        both = (selections.astype(dtype) @ (one + other).astype(dtype)).astype(np.int64)
        apart = (signed @ (one - other).astype(dtype)).astype(np.int64)
        # With as many tokens on both sides, JS2D is ln 2 + sum (a ln a + b ln b - (a + b) ln (a + b)) / 2N.
        either = both[rows]
        found += weighed[(either + apart) // 2].sum(-1) + weighed[(either - apart) // 2].sum(-1) - weighed[both].sum(-1)[rows]
    number = (selections @ tokens)[rows]
    return np.where(number > 0, np.log(2) + found / (2 * np.maximum(1, number)), 0.0)


def _by_block(cells: NDArray[np.int64], block: NDArray[np.int64], num_blocks: int, size: int) -> NDArray[np.int64]:
    """Tokens of each block in the cells from 0 to `size`, [num_blocks, size]."""
    here = (cells >= 0) & (cells < size)
    return np.bincount(block[here] * size + cells[here], minlength=num_blocks * size).reshape(num_blocks, size)
