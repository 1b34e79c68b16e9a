"""One pass over a grid ranks as the study's two passes over tokens do, and the regions are its rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from softprune.mask import MaskModel
from softprune.ranking.api import rank
from softprune.ranking.eaft_regions import REGIONS, Axis, Rule, regions, shares
from softprune.stats.figures import overlap, rank_correlation
from softprune.stats.file import Statistics
from softprune.stats.grid import DEFAULT_GRID, bin_of
from softprune.stats.header import Eaft, MaskEpoch, Plane
from softprune.stats.layout import SPECS, shapes
from tests.unit.stats_of import header

LAYERS, EXPERTS, TOP_K, TOKENS = 6, 32, 4, 16_000
MODEL = MaskModel(architecture="GptOssForCausalLM", num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, fingerprint="sha256:" + "c" * 64)


def tokens(kind: str, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p and H of tokens: "20b" as the study found them (p_lo about 0.02, h_lo about 0.02, h_hi about 0.75), "sure" as the small model has
    them, of which 15 % lie below p = 0.995 and H = 1e-6."""
    rng = np.random.default_rng(seed)
    if kind == "20b":
        h = rng.beta(0.55, 0.8, TOKENS)
        p = np.clip(rng.beta(0.35, 0.5, TOKENS) * (1 - h) + rng.beta(0.5, 2.5, TOKENS) * h, 1e-7, 1)
        return p, h
    logit = rng.normal(8.0, 3.2, TOKENS)
    p = np.clip(1 / (1 + np.exp(-logit)), 1e-7, 1)
    h = np.clip((1 - p) * rng.lognormal(-1.5, 2.0, TOKENS), 1e-9, 1)
    return p, h


def routed(p: NDArray[np.float64], h: NDArray[np.float64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(experts, gate times norm) [LAYERS, TOKENS, TOP_K]; experts have likings of their own, some for sure tokens and some for others."""
    rng = np.random.default_rng(seed)
    chosen, mass = [], []
    sureness = (1 - h)[:, None] + p[:, None]
    for _ in range(LAYERS):
        logits = rng.normal(0, 1.2, EXPERTS) + sureness * rng.normal(0, 1.0, EXPERTS) + rng.gumbel(0, 1, (TOKENS, EXPERTS))
        best = np.argsort(-logits, 1)[:, :TOP_K]
        top = np.take_along_axis(logits, best, 1)
        gates = np.exp(top - top.max(1, keepdims=True))
        chosen.append(best)
        mass.append(gates / gates.sum(1, keepdims=True) * rng.lognormal(3, 0.5, (TOKENS, TOP_K)) * rng.lognormal(0, 0.4, EXPERTS)[best])
    return np.stack(chosen), np.stack(mass)


def binned(p: NDArray[Any], h: NDArray[Any], chosen: NDArray[Any], mass: NDArray[Any]) -> Statistics:
    """What a collector with the default grid keeps of these tokens."""
    head = header(
        "run", ("default",), ("eaft",), model=MODEL, epochs=[MaskEpoch.of("run", 0, None, MODEL)],
        eaft=Eaft(plane=Plane(), grid=DEFAULT_GRID),
    )  # fmt: skip
    raw = {name: np.zeros(shape, SPECS[name].dtype) for name, shape in shapes(head).items()}
    x, y = bin_of(np.log10(p), DEFAULT_GRID.log10_p), bin_of(h, DEFAULT_GRID.entropy)
    for layer in range(LAYERS):
        cell = (0, 0, layer, chosen[layer], x[:, None], y[:, None])
        np.add.at(raw["eaft.grid_count"], cell, 1)
        np.add.at(raw["eaft.grid_gate_norm"], cell, mass[layer])
    return Statistics.of(head, raw)


@pytest.mark.parametrize("rule", ["code", "policy"])
@pytest.mark.parametrize("kind", ["20b", "sure"])
def test_the_grid_ranks_as_two_passes(kind: str, rule: Rule) -> None:
    for seed in range(3):
        p, h = tokens(kind, seed)
        chosen, mass = routed(p, h, seed)
        limits = np.quantile(p, 0.15), np.quantile(h, 0.15), np.quantile(h, 0.85)
        weight = np.array([1.0, 0.25, -2.0])[regions(rule, p, h, *map(float, limits))]
        exact = np.zeros((LAYERS, EXPERTS))
        for layer in range(LAYERS):
            np.add.at(exact[layer], chosen[layer], weight[:, None] * mass[layer])
        found = rank(binned(p, h, chosen, mass), "eaft_reap", rule=rule)
        assert rank_correlation(found.values, exact).min() >= 0.99
        for number, share in ((24, 0.97), (16, 0.95), (8, 0.90)):
            assert overlap(found.values, exact, number).mean() >= share
        # The counts of the regions: of a bin that a threshold cuts, the share is known but not which of its cells it lies in.
        counts = np.bincount(regions(rule, p, h, *map(float, limits)), minlength=3)
        for name, count in zip(REGIONS, counts, strict=True):
            assert found.found["region_counts"][name] == pytest.approx(count, abs=0.02 * TOKENS)


def test_regions_are_the_rules_of_the_study() -> None:
    p, h = np.array([0.5, 0.01, 0.01, 0.5, 0.01, 0.1]), np.array([0.1, 0.1, 0.9, 0.9, 0.5, 0.2])
    names = np.array(REGIONS)
    # Thresholds p_lo 0.1, h_lo 0.2, h_hi 0.8; the last token lies on p_lo and h_lo.
    code = names[regions("code", p, h, 0.1, 0.2, 0.8)].tolist()
    assert code == ["good", "conflict", "uncertain", "uncertain", "uncertain", "good"]
    policy = names[regions("policy", p, h, 0.1, 0.2, 0.8)].tolist()
    assert policy == ["good", "conflict", "uncertain", "good", "good", "conflict"]


def test_shares_of_a_cell() -> None:
    p, low, high = np.array([1.0, 0.5, 0.0]), np.array([1.0, 0.25, 0.0]), np.array([0.0, 0.5, 1.0])
    for rule in ("code", "policy"):
        found = shares(rule, p, low, high)  # type: ignore[arg-type]
        np.testing.assert_allclose(sum(found.values()), 1)
        assert found["conflict"].tolist() == [[1, 0.25, 0], [0.5, 0.125, 0], [0, 0, 0]]
    assert shares("code", p, low, high)["uncertain"].tolist() == [[0, 0.75, 1]] * 3
    assert shares("policy", p, low, high)["uncertain"].tolist() == [[0, 0.5, 1], [0, 0.25, 0.5], [0, 0, 0]]


def test_axis() -> None:
    axis = Axis(np.array([0.0, 1.0, 2.0, 4.0]), np.array([10.0, 0.0, 30.0]))
    assert axis.threshold(0.125) == 0.5
    assert axis.below(0.125).tolist() == [0.5, 0, 0]
    assert axis.threshold(0.5) == pytest.approx(2 + 2 / 3)
    # A bin without tokens lies below or above as a whole.
    np.testing.assert_allclose(axis.below(0.5), [1, 1, 1 / 3])
    assert axis.quantile(0.5) == 0.125
    assert axis.quantile(3.0) == pytest.approx(0.625)
    np.testing.assert_allclose(axis.below(0.9999999), [1, 1, 0.9999999 / 0.75 - 0.25 / 0.75])
