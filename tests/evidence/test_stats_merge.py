"""A hundred files of the 120B shape with co-activation and 8 tags add up within 10 s and 2 GiB. Needs 4 GB of disk.

Run alone: pytest tests/evidence/test_stats_merge.py -s
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from softprune.mask import MaskModel
from softprune.stats.file import Statistics, read, write
from softprune.stats.header import MaskEpoch, Tokens
from tests.conftest import Evidence
from tests.unit.stats_of import header

NUM_FILES = 100
TAGS = ["default", *(f"tag {i}" for i in range(7))]
MODEL = MaskModel(architecture="GptOssForCausalLM", num_layers=36, num_experts=128, top_k=4, fingerprint="sha256:" + "a" * 64)
# The whole command, interpreter and imports included.
COMMAND = """
import json, sys, time
from softprune.bench.process_memory import status_mib
from softprune.cli import app
try:
    app(["stats", "merge", *sys.argv[2:], "--out", sys.argv[1]])
finally:
    print(json.dumps({"cpu_seconds": time.process_time(), "peak_mib": status_mib("VmHWM")}))
"""


def unit() -> Statistics:
    """One file's content: every sum and count random, the diagonal of the co-activation as it has to be."""
    rng = np.random.default_rng(0)
    size = (len(TAGS), MODEL.num_layers, MODEL.num_experts)
    count = rng.integers(1, 10_000, (len(TAGS), 2, *size[1:]))
    pairs = np.triu(rng.integers(0, 1000, (*size, MODEL.num_experts)), 1)
    pairs[..., range(MODEL.num_experts), range(MODEL.num_experts)] = count.sum(1)
    head = header("0", TAGS, ("router",), {tag: Tokens(prefill=1, decode=1, cached=0) for tag in TAGS}, **_of("0"))
    tensors = {
        "router.count": count,
        "router.gate_sum": count * rng.uniform(0.1, 0.6, count.shape),
        "router.confidence": rng.integers(0, 1000, (*count.shape[:3], head.confidence_bins or 0)),
        "router.coactivation": pairs,
    }
    return Statistics.of(head, tensors)


def _of(run: str) -> dict[str, object]:
    return {"model": MODEL, "epochs": [MaskEpoch.of(run, 0, None, MODEL)]}


@pytest.mark.timeout(600)
def test_a_hundred_files_of_the_120b_shape(tmp_path: Path, evidence: Evidence) -> None:
    one = unit()
    factors = [1 + i % 5 for i in range(NUM_FILES)]
    paths = []
    for i, factor in enumerate(factors):
        head = header(f"run-{i:03}", TAGS, ("router",), one.header.tokens, **_of(f"run-{i:03}"))
        paths.append(tmp_path / f"{i:03}.safetensors")
        write(Statistics(head, {name: values * factor for name, values in one.tensors.items()}), paths[-1])
    out = tmp_path / "out.safetensors"
    begun = time.monotonic()
    run = subprocess.run([sys.executable, "-c", COMMAND, str(out), *map(str, paths)], capture_output=True, text=True, check=True)
    seconds = time.monotonic() - begun
    figures = {"files": NUM_FILES, "bytes": sum(path.stat().st_size for path in paths), "seconds": seconds}
    figures |= json.loads(run.stdout.splitlines()[-1])
    evidence("stats.merge.120b", figures)
    total = read(out)
    for name, values in one.tensors.items():
        assert total[name].tobytes() == (values * sum(factors)).tobytes(), name
    assert len(total.header.runs) == NUM_FILES
    assert figures["seconds"] < 10
    assert figures["peak_mib"] < 2048
    for path in tmp_path.iterdir():
        path.unlink()
