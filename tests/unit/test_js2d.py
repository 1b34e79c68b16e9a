"""JS2D is what spec/metrics.md 2 says, and its correction and interval hold where the truth is known."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
from numpy.typing import NDArray

from softprune.evaluate.js2d import MIN_BLOCKS, divergence, effective_blocks, independent, paired
from softprune.evaluate.plane import Plane
from tests.unit.evaluations import scored

CELLS = 200


def slow_divergence(a: list[int], b: list[int]) -> float:
    if not sum(a) or not sum(b):
        return 0.0
    p, q = [x / sum(a) for x in a], [x / sum(b) for x in b]
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    kl = [sum(x * math.log(x / max(1e-12, y)) for x, y in zip(side, m, strict=True) if x > 0) for side in (p, q)]
    return sum(kl) / 2


class Law:
    """Tokens whose two cells are drawn together: a share stays in its cell, the others move by a law of their own.

    `shift` moves the candidate's law away from the base's; without it both sides have one law, and JS2D is 0 but for the bias. Tokens of a
    block are alike: each block prefers a part of the cells.
    """

    def __init__(self, shift: float, moved: float = 0.5, copied: float = 0.05) -> None:
        height = np.exp(-np.arange(CELLS) / 40)
        self.weights, self.moved, self.copied = height / height.sum(), moved, copied
        tilted = self.weights * np.exp(shift * np.cos(np.arange(CELLS) / 5))
        self.tilted = tilted / tilted.sum()
        self.truth = float(divergence(1e9 * self.weights, 1e9 * (self.weights * (1 - moved) + self.tilted * moved)))

    def draw(self, blocks: int, tokens: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Cells of both sides, and tokens of each block."""
        rng = np.random.default_rng(seed)
        sizes = rng.integers(tokens // 2, tokens * 3 // 2, blocks)
        base = rng.choice(CELLS, sizes.sum(), p=self.weights)
        # Of each block some tokens are copies of its first, so that a block says less than as many independent tokens.
        first = np.repeat(np.cumsum(sizes) - sizes, sizes)
        copied = rng.random(len(base)) < self.copied
        base = np.where(copied, base[first], base)
        candidate = np.where(rng.random(len(base)) < self.moved, rng.choice(CELLS, len(base), p=self.tilted), base)
        return base, candidate, sizes


def counts(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.bincount(cells, minlength=CELLS)


def test_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.poisson(0.7, (2, 50))
        b = b * rng.integers(1, 5)
        assert float(divergence(a, b)) == pytest.approx(slow_divergence(a.tolist(), b.tolist()), abs=1e-14)
        assert float(divergence(a, b)) == pytest.approx(float(divergence(b, a)), abs=1e-15)
    assert float(divergence(np.array([3, 0]), np.array([0, 8]))) == pytest.approx(math.log(2))
    assert float(divergence(np.array([3, 6]), np.array([1, 2]))) == 0
    assert float(divergence(np.array([0, 0]), np.array([1, 2]))) == 0
    several = rng.poisson(2.0, (2, 3, 50))
    assert divergence(*several).tolist() == [float(divergence(a, b)) for a, b in zip(*several, strict=True)]


def test_whole_blocks_are_what_is_compared() -> None:
    base, candidate, sizes = Law(0.5).draw(40, 50, 0)
    assert paired(base, candidate, sizes).raw == pytest.approx(slow_divergence(counts(base).tolist(), counts(candidate).tolist()))
    assert paired(base, candidate, sizes).occupied_cells == len(set(base) | set(candidate))


def test_the_same_twice_is_exactly_zero() -> None:
    base, _, sizes = Law(0.0).draw(MIN_BLOCKS, 50, 0)
    found = paired(base, base, sizes)
    assert astuple(found)[:5] == (0.0, 0.0, 0.0, 0.0, 0.0)
    # What the bias of independent samples would be is far from it.
    assert independent(counts(base), counts(base)).bias > 0.05


def test_a_seed_gives_one_answer() -> None:
    drawn = Law(0.5).draw(20, 50, 0)
    assert paired(*drawn, seed=3) == paired(*drawn, seed=3)
    assert paired(*drawn, seed=3) != paired(*drawn, seed=4)


@pytest.mark.parametrize("moved", [0.1, 0.5, 1.0])
def test_the_bias_of_paired_tokens(moved: float) -> None:
    """Where cells are well filled: what the expansion gives, and what exchanging sides measures."""
    law = Law(0.0, moved, copied=0.0)
    found = []
    for seed in range(12):
        base, candidate, sizes = law.draw(64, 750, seed)
        stays, either = counts(base[base == candidate]), counts(base) + counts(candidate)
        expansion = (1 - 2 * stays[either > 0] / either[either > 0]).sum() / (4 * len(base))
        measured = paired(base, candidate, sizes, seed=seed) if seed < 3 else None
        raw = float(divergence(counts(base), counts(candidate)))
        found.append((raw, expansion, np.nan if measured is None else measured.bias, independent(counts(base), counts(candidate)).bias))
    raw, expansion, measured, unpaired = np.nanmean(np.array(found), 0)
    assert expansion == pytest.approx(raw, rel=0.08)
    assert measured == pytest.approx(raw, rel=0.12)
    assert unpaired == pytest.approx(raw / moved, rel=0.2)


def test_the_bias_of_independent_samples_of_unequal_size() -> None:
    law, rng = Law(0.0).weights, np.random.default_rng(0)
    found = []
    for _ in range(40):
        a, b = rng.multinomial(40_000, law), rng.multinomial(160_000, law)
        js2d = independent(a, b)
        found.append((js2d.raw, js2d.bias))
    raw, bias = np.mean(found, 0)
    assert bias == pytest.approx((CELLS - 1) / 8 * (1 / 40_000 + 1 / 160_000), rel=0.02)
    assert raw == pytest.approx(bias, rel=0.05)


@pytest.mark.parametrize(("shift", "tokens", "share"), [(0.0, 10, 0.0), (0.0, 100, 0.0), (1.0, 8, 0.7), (1.0, 30, 0.9), (1.0, 120, 0.95)])
def test_corrected_values_lie_about_the_truth(shift: float, tokens: int, share: float) -> None:
    """`tokens` a block, 40 blocks: from 2 tokens a cell. `share` is how much of the truth is at least found; the raw value is far off."""
    law = Law(shift)
    found = [paired(*law.draw(40, tokens, seed), seed=seed) for seed in range(16)]
    values = np.array([one.corrected for one in found])
    error = 2.5 * values.std() / math.sqrt(len(values))
    assert law.truth * share - error <= values.mean() <= law.truth + error
    raw = np.mean([one.raw for one in found])
    assert raw - law.truth > 4 * abs(values.mean() - law.truth)


@pytest.mark.parametrize(("shift", "tokens"), [(0.0, 50), (0.5, 50), (1.0, 15), (1.0, 150)])
def test_intervals_cover_the_truth(shift: float, tokens: int) -> None:
    law = Law(shift)
    found = [paired(*law.draw(32, tokens, seed), seed=seed) for seed in range(30)]
    ends = [(one.low, one.high) for one in found if one.low is not None and one.high is not None]
    covered = sum(low <= law.truth <= high for low, high in ends)
    assert covered >= 27, f"{covered} of 30; 95 % are 28 or 29"
    # They are no wider than twice what a normal law asks for, so that they say something.
    assert np.mean([high - low for low, high in ends]) < 8 * np.std([one.corrected for one in found])


def test_what_blocks_are_worth() -> None:
    assert effective_blocks(np.array([5] * 12)) == pytest.approx(12)
    assert effective_blocks(np.array([5] * 12 + [0] * 100)) == pytest.approx(12)
    assert effective_blocks(np.array([40_000] + [2] * 15)) == pytest.approx(1, abs=0.01)


def test_blocks_without_tokens_change_nothing() -> None:
    base, candidate, sizes = Law(1.0).draw(40, 50, 0)
    assert paired(base, candidate, np.ravel(np.column_stack([sizes, np.zeros_like(sizes)]))) == paired(base, candidate, sizes)


def test_few_large_blocks_have_no_interval() -> None:
    """Two thirds of the tokens lie in two blocks; what is real is found all the same, on the mean."""
    law, found = Law(1.0), []
    for seed in range(12):
        parts = [law.draw(1, 8000 if k < 2 else 200, 100 * seed + k) for k in range(42)]
        found.append(paired(*(np.concatenate(side) for side in zip(*parts, strict=True))))
    assert all((one.low, one.high) == (None, None) for one in found)
    assert all(1 < one.worth < MIN_BLOCKS for one in found if one.worth is not None)
    assert np.mean([one.corrected for one in found]) == pytest.approx(law.truth, rel=0.15)


def test_halving_the_tokens_moves_the_raw_value_only() -> None:
    """On planes of 160 x 120, about one token a cell."""
    base, candidate, sizes = (scored_cells(shift, noise) for shift, noise in ((0.0, 0.0), (0.3, 0.6), (None, 0.0)))
    half = int(sizes[:32].sum())
    whole, first = paired(base, candidate, sizes), paired(base[:half], candidate[:half], sizes[:32])
    assert whole.low is not None
    assert whole.high is not None
    assert abs(first.corrected - whole.corrected) < whole.high - whole.low
    assert first.raw - whole.raw > 5 * (whole.high - whole.low)


def scored_cells(shift: float | None, noise: float) -> NDArray[np.int64]:
    """Cells of 64 blocks; without a shift, tokens of each block."""
    blocks = scored(shift or 0.0, noise, num_blocks=64, tokens=400)
    if shift is None:
        return np.array([len(log_p) for log_p, _ in blocks])
    plane = Plane()
    return np.concatenate([plane.cells_of(np.exp(log_p.astype(np.float64)), entropy) for log_p, entropy in blocks]).astype(np.int64)
