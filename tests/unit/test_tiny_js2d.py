"""The figures of JS2D against the number of tokens, and what they are there to show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from softprune.bench.tiny.js2d_bias import halving, measure, plot
from softprune.evaluate.evaluation import BlockSums, of
from softprune.evaluate.js2d import paired
from tests.unit.evaluations import document

ROWS = (("UNION", 1024),)


def blocks_of(shift: float, noise: float) -> BlockSums:
    found = of(document(shift, noise, rows=ROWS, num_blocks=70), "e.json").cell("UNION", 1024).blocks
    assert found is not None
    return found


def test_selections_are_disjoint_and_of_whole_blocks(tmp_path: Path) -> None:
    base, candidate = blocks_of(0.0, 0.0), blocks_of(0.2, 0.2)
    entries = measure(base, candidate, 160 * 120)
    assert [(entry["blocks"], len(entry["raw"])) for entry in entries] == [(17, 4), (35, 2), (70, 1)]
    whole = paired(base.cells, candidate.cells, base.tokens)
    assert (entries[-1]["tokens"], entries[-1]["raw"]) == (base.tokens.sum(), [round(whole.raw, 6)])
    assert np.isclose(sum(entry["tokens"] * len(entry["raw"]) for entry in entries[1:2]), base.tokens.sum())
    plot({"one": entries, "two": entries}, tmp_path / "a.svg")
    plot({"one": entries, "two": entries}, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_what_is_committed_shows_it() -> None:
    """On the trained model, half of the tokens move the corrected value by less than its interval, and the raw one visibly."""
    document = json.loads(Path("bench/results/js2d_bias.json").read_text())
    assert document["tokens"] > 100_000
    for label, entries in document["candidates"].items():
        change = halving(entries)
        assert change == document["halving"][label]
        assert change["worst_corrected"] < change["interval_width"]
        assert change["halves_whose_interval_holds_the_whole"] == 2
        assert change["raw"] > 2 * change["interval_width"]
