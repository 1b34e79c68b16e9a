"""Perplexities, intervals and differences from random pruning are what they are called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softprune.bench.tiny.methods import KEEPS, METHODS, all_cells
from softprune.bench.tiny.methods_figures import cells, table
from softprune.bench.tiny.methods_plot import plot
from softprune.ranking.api import model_of_checkpoint
from softprune.stats.errors import StatisticsError
from tests.unit.test_recipe import made_stats

TOKENS = [100, 300, 50, 150] * 10


def entry(method: str, keep: int, nll_a_token: float, seed: int | None = None, noise: float = 0.0) -> dict[str, Any]:
    rng = np.random.default_rng(abs(hash((method, keep, seed))) % 2**32 if noise else 0)
    nll = [tokens * (nll_a_token + noise * rng.normal()) for tokens in TOKENS]
    return {"method": method, "keep": keep, "seed": seed, "mask": "m", "nll": nll}


RAW = [
    entry("unmasked", 32, 0.1), entry("good", 16, 0.2), entry("bad", 16, 0.9), entry("same", 16, 0.5),
    *(entry("random", 16, 0.4 + 0.05 * seed, seed) for seed in range(5)),
]  # fmt: skip


def test_figures() -> None:
    found = cells(RAW, TOKENS)
    assert found["unmasked"]["ppl"] == pytest.approx(math.exp(0.1))
    rows = {method: row["16"] for method, row in found["methods"].items()}
    seeds = [math.exp(0.4 + 0.05 * seed) for seed in range(5)]
    assert rows["random"]["seeds"] == pytest.approx(seeds)
    assert rows["random"]["ppl"] == pytest.approx(np.mean(seeds))
    assert rows["good"]["ppl"] == pytest.approx(math.exp(0.2))
    assert rows["good"]["minus_random"] == pytest.approx(math.exp(0.2) - np.mean(seeds))
    # The mean of the seeds' perplexities is a hair above exp(0.5), which a mean of those seeds may be or not.
    assert [rows[method]["beats_random"] for method in ("good", "bad", "same")] == [True, False, True]
    assert [rows[method]["beats_random_with_seeds"] for method in ("good", "bad", "same")] == [True, False, False]
    # Blocks that all say the same leave only the seeds to draw.
    assert rows["good"]["interval"] == pytest.approx([math.exp(0.2)] * 2)
    low, high = rows["same"]["minus_random_interval"]
    assert low == pytest.approx(high) == pytest.approx(math.exp(0.5) - np.mean(seeds))
    low, high = rows["same"]["minus_random_interval_with_seeds"]
    assert low < 0 < high
    assert "16" in str(table(found).columns[1].header)


def test_intervals_cover_the_blocks() -> None:
    """About as wide as the error of a mean over 40 blocks."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.1, len(TOKENS))
    raw = [RAW[0], {**entry("x", 16, 0.0), "nll": [t * v for t, v in zip(TOKENS, values, strict=True)]}, *RAW[4:]]
    low, high = cells(raw, TOKENS)["methods"]["x"]["16"]["interval"]
    weights = np.array(TOKENS) / sum(TOKENS)
    error = math.sqrt((weights**2 * (values - weights @ values) ** 2).sum())
    assert (math.log(high) - math.log(low)) == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_same_cells_every_time(tmp_path: Path) -> None:
    stats = made_stats(model_of_checkpoint(Path("bench/tiny/weights")), tmp_path / "stats.safetensors")
    with pytest.raises(StatisticsError, match="router"):
        all_cells(stats)
    some = all_cells(stats, (16,), ("reap_sum", "ean sum"))
    assert [(cell.method, cell.keep, cell.seed) for cell in some] == [
        ("unmasked", 32, None), ("reap_sum", 16, None), *(("random", 16, seed) for seed in range(5)), ("ean sum", 16, None)
    ]  # fmt: skip
    assert [cell.key for cell in some] == [cell.key for cell in all_cells(stats, (16,), ("reap_sum", "ean sum"))]
    assert {24, 16} <= set(KEEPS)
    assert {"frequency", "reap_sum", "eaft_reap"} <= set(METHODS)


def test_plot(tmp_path: Path) -> None:
    figures = cells(RAW, TOKENS)
    plot(figures, tmp_path / "a.svg")
    plot(figures, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert text.startswith("<?xml")
