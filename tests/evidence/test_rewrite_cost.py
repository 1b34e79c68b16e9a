"""Rewriting the 20B shape costs little more than `cp` of what it writes, and next to no memory. Needs 40 GB of disk, some ten minutes.

Run alone: pytest tests/evidence/test_rewrite_cost.py -s. `python -m softprune.bench.rewrite` keeps the figures.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from softprune.bench.rewrite import CACHES, measure
from tests.conftest import Evidence


@pytest.mark.timeout(3000)
def test_cost_of_the_20b_shape(tmp_path: Path, evidence: Evidence) -> None:
    try:
        summary = measure(tmp_path, repeats=3)["summary"]
    finally:
        shutil.rmtree(tmp_path)
    evidence("rewrite.20b_keep24", summary)
    for cache in CACHES:
        assert summary[cache]["time_over_cp"]["median"] <= 1.3, cache
    assert summary["peak_mib"] < 1024
