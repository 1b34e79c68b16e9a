"""From sums by block to perplexities with intervals, and differences from random pruning.

Blocks are drawn with replacement, the same draws for every cell, so that differences are paired. Random pruning is the mean of its seeds'
perplexities: of those that were measured, or, as a stricter question, with seeds drawn as well, since five don't say for certain where
the mean of all lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

DRAWS, SEED, LEVEL = 10_000, 20260101, 0.95
UNMASKED, RANDOM = "unmasked", "random"


def cells(raw: Sequence[dict[str, Any]], tokens: Sequence[int]) -> dict[str, Any]:
    """Figures of every method and number kept.

    Args:
        raw: entries with "method", "keep", "seed" and "nll", the sums of each block in nats.
        tokens: completion tokens of each block.

    Returns:
        {"draws", "level", "unmasked": {"ppl", "interval"}, "methods": {method: {keep: figures}}}; figures are "ppl" and its "interval";
        and, but for random pruning, "minus_random" (perplexity less the mean of the seeds' perplexities), its "minus_random_interval",
        "minus_random_interval_with_seeds", and whether they lie below 0 ("beats_random", "beats_random_with_seeds"). Of random
        pruning "ppl" is that mean, and "seeds" all of them.
    """
    rng = np.random.default_rng(SEED)
    number = np.asarray(tokens, np.float64)
    draws = rng.multinomial(len(number), np.full(len(number), 1 / len(number)), DRAWS).astype(np.float64)
    nll: dict[tuple[str, int], NDArray[np.float64]] = {}
    for entry in raw:
        key = (entry["method"], entry["keep"])
        nll[key] = np.vstack([nll[key], entry["nll"]]) if key in nll else np.asarray([entry["nll"]], np.float64)
    # [rows of a cell], and [DRAWS, rows of a cell].
    whole = {key: np.exp(rows.sum(1) / number.sum()) for key, rows in nll.items()}
    drawn = {key: np.exp(draws @ rows.T / (draws @ number)[:, None]) for key, rows in nll.items()}
    figures: dict[str, Any] = {}
    for (method, keep), found in whole.items():
        if method == UNMASKED:
            continue
        entry = {"ppl": float(found.mean()), "interval": _interval(drawn[method, keep].mean(1))}
        if method == RANDOM:
            entry["seeds"] = found.tolist()
        else:
            others = drawn[RANDOM, keep]
            seeds = rng.integers(0, others.shape[1], (DRAWS, others.shape[1]))
            own = drawn[method, keep][:, 0]
            entry["minus_random"] = float(found[0] - whole[RANDOM, keep].mean())
            for name, mean in (("", others.mean(1)), ("_with_seeds", np.take_along_axis(others, seeds, 1).mean(1))):
                interval = _interval(own - mean)
                entry |= {f"minus_random_interval{name}": interval, f"beats_random{name}": interval[1] < 0}
        figures.setdefault(method, {})[str(keep)] = entry
    key = next(key for key in whole if key[0] == UNMASKED)
    return {
        "draws": DRAWS, "level": LEVEL, "seed": SEED,
        UNMASKED: {"ppl": float(whole[key][0]), "interval": _interval(drawn[key][:, 0])}, "methods": figures,
    }  # fmt: skip


def _interval(values: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def _stars(entry: dict[str, Any]) -> str:
    return "*" * sum(bool(entry.get(name)) for name in ("beats_random", "beats_random_with_seeds"))


def table(figures: dict[str, Any]) -> Table:
    """Perplexities, a row for each method, best at the smallest number kept first; `*` beats random pruning, `**` with seeds drawn."""
    keeps = sorted({int(keep) for row in figures["methods"].values() for keep in row}, reverse=True)
    shown = Table("method", *(f"keep {keep}" for keep in keeps), title=f"UNION perplexity (unmasked {figures[UNMASKED]['ppl']:.4f})")
    for method, row in sorted(figures["methods"].items(), key=lambda item: item[1][str(keeps[-1])]["ppl"]):
        shown.add_row(method, *(f"{row[str(keep)]['ppl']:.4f}{_stars(row[str(keep)])}" for keep in keeps))
    return shown
