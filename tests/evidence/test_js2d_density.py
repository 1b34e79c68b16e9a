"""From how many tokens on the corrected JS2D's interval can be judged, and what holds of fewer: simulations of laws whose JS2D is known.

Run alone: pytest tests/evidence/test_js2d_density.py; ten minutes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from softprune.evaluate.js2d import MIN_BLOCKS, divergence, paired
from softprune.evaluate.pair import COARSER, FEW_TOKENS, MARGIN, MIN_DENSITY
from softprune.evaluate.plane import COARSE, Plane
from tests.conftest import Evidence

pytestmark = pytest.mark.timeout(1800)
SIZES = ((16, 31), (16, 125), (32, 250), (64, 250), (64, 500), (128, 500))
"""Blocks, and tokens of each on the mean."""
TRIES = 16
Drawn = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Law:
    """Tokens, most of them nearly certain, of which a share becomes less likely and gets another entropy.

    Attributes:
        shape: of the gamma law of their negative log-likelihood; the smaller, the more tokens lie in one corner of the plane.
        harm, tail: mean of what is added to it, and shape of its gamma law.
        spread: of what is added to the entropy.
        share: of the tokens.
        jitter: relative change of all, to either side.
        far: share of tokens that land anywhere on the plane.
    """

    shape: float
    harm: float
    tail: float
    spread: float
    share: float = 1.0
    jitter: float = 0.0
    far: float = 0.0

    def draw(self, blocks: int, tokens: int, seed: int) -> Drawn:
        """Cells of both sides, and tokens of each block."""
        rng = np.random.default_rng(seed)
        sizes = rng.integers(tokens // 2, tokens * 3 // 2 + 1, blocks)
        number = int(sizes.sum())
        nll = rng.gamma(self.shape, 1.0, number) * np.repeat(np.exp(rng.normal(0, 0.3, blocks)), sizes)
        height, hit = rng.beta(2, 3, number), rng.random(number) < self.share
        worse = nll + hit * self.harm * rng.gamma(self.tail, 1 / self.tail, number)
        higher = np.clip(height + hit * rng.normal(0, self.spread, number), 0, 1)
        if self.jitter:
            worse = np.abs(worse * (1 + rng.normal(0, self.jitter, number)))
        if self.far:
            lost = rng.random(number) < self.far
            worse, higher = np.where(lost, rng.uniform(0.3, 6, number), worse), np.where(lost, rng.uniform(0, 1, number), higher)
        return _cells(nll, height), _cells(worse, higher), sizes

    @property
    def truth(self) -> float:
        """JS2D of 18 million tokens, whose bias is 0.0002 at most."""
        planes = np.zeros((2, 160 * 120))
        for seed in range(24):
            one, other, _ = self.draw(64, 12_000, 10_000 + seed)
            planes += [np.bincount(side, minlength=160 * 120) for side in (one, other)]
        return float(divergence(*planes))


def _cells(nll: NDArray[np.float64], height: NDArray[np.float64]) -> NDArray[np.int64]:
    return Plane().cells_of(np.exp(-nll), np.clip((1 - np.exp(-nll)) * height * 1.6, 0, 1)).astype(np.int64)


LAWS = {
    "spread out": Law(0.25, 0.15, 0.5, 0.1), "usual": Law(0.1, 0.1, 0.5, 0.1), "usual, little harm": Law(0.1, 0.05, 0.2, 0.2),
    "usual, a third harmed": Law(0.1, 0.3, 0.3, 0.2, 0.3), "certain": Law(0.05, 0.1, 0.3, 0.2),
    "certain, a fifth harmed": Law(0.05, 0.4, 0.3, 0.2, 0.2),
}  # fmt: skip

OTHER_LAWS = {
    "6 % anywhere": Law(0.1, 0.0, 1, 0.0, jitter=0.1, far=0.06), "3 % anywhere": Law(0.1, 0.0, 1, 0.0, jitter=0.1, far=0.03),
    "certain, 10 % anywhere": Law(0.05, 0.0, 1, 0.0, jitter=0.05, far=0.1),
    "spread out, 5 % anywhere": Law(0.25, 0.0, 1, 0.0, jitter=0.2, far=0.05), "hardly any": Law(0.1, 0.0, 1, 0.0, jitter=0.05),
    "to either side": Law(0.1, 0.0, 1, 0.0, jitter=0.2), "entropy only": Law(0.1, 0.0, 1, 0.15),
    "spread out, entropy only": Law(0.25, 0.0, 1, 0.15),
}  # fmt: skip


def test_ends_of_three_planes_hold_the_truth(evidence: Evidence) -> None:
    """The largest lower end, and twice the largest upper: where hardly two tokens move between the same cells, one plane says little."""
    figures: dict[str, Any] = {}
    tries = above = 0
    for name, law in (LAWS | OTHER_LAWS).items():
        truth, rows = law.truth, {}
        for blocks, tokens in SIZES[1:]:
            assert blocks * tokens >= FEW_TOKENS
            worst = 0.0
            for seed in range(TRIES // 2):
                one, other, sizes = law.draw(blocks, tokens, seed)
                found = [paired(Plane().coarse(one, by), Plane().coarse(other, by), sizes, seed) for by in (1, COARSE, COARSER)]
                worst = max(worst, truth / max(plane.high for plane in found if plane.high is not None))
                tries, above = tries + 1, above + (max(plane.low for plane in found if plane.low is not None) > truth)
            rows[blocks * tokens] = round(worst, 2)
        figures[name] = {"truth": round(truth, 4), "truth_over_the_largest_upper_end_by_tokens": rows}
    evidence("eval.js2d.three_planes", {"laws": figures, "tries": tries, "lower_ends_above_the_truth": above})
    assert above <= 0.05 * tries
    assert max(max(one["truth_over_the_largest_upper_end_by_tokens"].values()) for one in figures.values()) < MARGIN, figures


def test_the_upper_end_holds_the_truth_from_so_many_tokens_on(evidence: Evidence) -> None:
    figures, dense, sparse = {}, [], []
    for name, law in LAWS.items():
        truth = paired(*law.draw(64, 12_000, 99)).corrected
        rows = []
        for blocks, tokens in SIZES:
            found = [paired(*law.draw(blocks, tokens, seed), seed=seed) for seed in range(TRIES)]
            assert all(one.worth is not None and one.worth >= MIN_BLOCKS for one in found)
            # Few tokens only add to the raw value.
            assert np.mean([one.raw for one in found]) > truth
            below = sum(one.high is not None and one.high < truth for one in found)
            density = float(np.mean([one.density or 0 for one in found]))
            (dense if density >= MIN_DENSITY else sparse).append(below)
            rows.append({
                "tokens": blocks * tokens, "density": round(density, 2),
                "tokens_a_cell": round(blocks * tokens / found[0].occupied_cells, 2),
                "corrected": round(float(np.mean([one.corrected for one in found])), 4), "upper_end_below_the_truth": below,
            })  # fmt: skip
        figures[name] = {"truth": round(truth, 4), "tries": TRIES, "rows": rows}
    evidence("eval.js2d.density", figures)
    assert len(dense) >= 5
    assert sum(dense) <= 0.025 * TRIES * len(dense), figures
    # Without that rule it would be far from it.
    assert sum(sparse) > 0.25 * TRIES * len(sparse), figures
