"""One command from a model and packs to a verified smaller checkpoint, with a real vLLM in between.

Run alone: pytest tests/evidence/test_prune_packs.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from softprune.bench.tiny.weights import HERE as TINY
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.checkpoint.verify import verify_checkpoint
from softprune.evaluate.reference import load_reference
from softprune.evaluate.reference_stats import collect
from softprune.ranking.api import model_of_checkpoint, rank
from softprune.stats.collect_packs import load
from softprune.stats.figures import overlap
from softprune.stats.file import read
from tests.conftest import Evidence
from tests.engines.harness import BASE_ENV

pytestmark = pytest.mark.engine
WEIGHTS, PACKS, BLOCKS = TINY / "weights", [TINY / "packs" / f"{name}.parquet" for name in ("chat_if", "code")], 4


@pytest.mark.timeout(600)
def test_one_command(tmp_path: Path, evidence: Evidence) -> None:
    out = tmp_path / "out"
    command = [
        str(Path(sys.executable).parent / "softprune"), "prune", str(WEIGHTS), "--method", "eaft_reap", "--keep", "24", "--out", str(out),
        *(part for pack in PACKS for part in ("--packs", str(pack))), "--num-blocks", str(BLOCKS), "--engine-args", "--enforce-eager",
    ]  # fmt: skip

    def run() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=500, env={**os.environ, **BASE_ENV}).stdout

    first = run()
    assert "collect: " in first
    assert "skipped" not in first
    assert verify_checkpoint(WEIGHTS, out).problems == []
    statistics = read(tmp_path / "out.stats.safetensors")
    assert statistics.header.model.fingerprint == fingerprint_of_checkpoint(WEIGHTS)
    assert [statistics.header.tokens[pack.stem].prefill for pack in PACKS] == [BLOCKS * 1024] * 2
    # Transformers ranks by the same packs as the engine does, every token counted by `reap`, but for BF16.
    exact, _ = collect(load_reference(WEIGHTS), model_of_checkpoint(WEIGHTS), load(PACKS, str(WEIGHTS), 1024, BLOCKS), reap_everywhere=True)
    shares = {}
    for method in ("reap_sum", "eaft_reap"):
        a, b = (rank(one, method).values for one in (statistics, exact))
        shares[method] = {number: float(overlap(a, b, number).mean()) for number in (24, 16, 8)}
        assert np.mean(list(shares[method].values())) > 0.95
    evidence("prune.packs.overlap_with_transformers", shares)
    assert run().count("skipped") == 4
