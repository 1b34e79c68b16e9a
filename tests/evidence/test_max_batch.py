"""`bench max-batch` of a real SGLang whose KV room is small: the answer is what the room holds, and the next request is retracted.

Run alone: pytest tests/evidence/test_max_batch.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from softprune.bench.prompts import Workload
from tests.conftest import Evidence
from tests.engines.bench_checks import check_largest
from tests.engines.sglang_harness import start

ROOM, PROMPT, ANSWER = 2048, 64, 192


@pytest.mark.engine
def test_sglang_retracts_one_more(models: dict[str, Path], tmp_path: Path, evidence: Evidence) -> None:
    """2,048 tokens hold 8 sequences of 256; the scheduler is told to hope for the best, so the ninth runs until there is no room."""
    args = ("--enable-metrics", "--max-total-tokens", str(ROOM), "--schedule-conservativeness", "0.3")
    with start(models["qwen3-moe"], tmp_path / "log.txt", *args) as server:
        server.wait_ready()
        expected = ROOM // (PROMPT + ANSWER)
        found = check_largest(server, Workload(PROMPT, ANSWER), expected, f"of {expected + 1} requests were preempted")
        server.stop(grace=0)
    assert [one["batch"] for one in found["tries"]] == [8, 9, 8, 8]
    assert found["memory"]["kv_tokens"] == ROOM
    evidence("sglang_cpu.max_batch.room_2048", {name: found[name] for name in ("max_batch", "limit", "next_failed")})
