"""Masks switched live on two tensor-parallel ranks of a real SGLang server on the CPU.

Run alone: pytest tests/evidence/test_sglang_live.py
It was started with a mask, overlaps no steps, mixes prefills with decoding, has a rank that refuses one of the masks, and shares one
prefix cache among all masks, which is a mutation. The prefix cache is on, prefills come in small chunks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softprune.mask import ExpertMask
from tests.conftest import Evidence, random_mask, random_prompts, saved
from tests.engines.harness import API
from tests.engines.sglang_harness import CHUNK, Client, mixed_then_asked, start

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def masks(models: dict[str, Path]) -> dict[str, ExpertMask]:
    return {name: random_mask(models["qwen3-moe"], 9, seed=seed) for seed, name in enumerate("ABCD")}


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, Path], masks: dict[str, ExpertMask], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Two ranks, started with mask A; the second refuses D, and all masks share one prefix cache."""
    folder = tmp_path_factory.mktemp("two")
    env = {
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SOFTPRUNE_TEST_ONE_CACHE": "1", "SOFTPRUNE_TEST_REFUSE": f"1:{masks['D'].hash}",
        "DUMPER_SERVER_PORT": "reuse",
    }  # fmt: skip
    mask = saved(masks["A"], folder / "a.json")
    args = ("--tp-size", "2", "--expert-mask", mask, "--disable-overlap-schedule", "--enable-mixed-chunk")
    with start(models["qwen3-moe"], folder / "two.log", *args, env=env) as server:
        server.wait_ready()
        yield Client(server)
        server.stop(grace=0)


def test_live_is_launched(two_ranks: Client, masks: Any) -> None:
    """A mask that is put live gives exactly what it gives at launch, on every rank."""
    prompts = random_prompts(6, 2 * CHUNK, seed=1)
    launched = two_ranks.scores(prompts)
    two_ranks.switch(None)
    assert two_ranks.scores(prompts) != launched
    two_ranks.switch(masks["A"])
    assert two_ranks.scores(prompts) == launched


def test_one_rank_refuses(two_ranks: Client, masks: Any) -> None:
    """Then none changes, and the server serves on."""
    prompts = random_prompts(2, CHUNK, seed=12)
    two_ranks.switch(masks["A"])
    before, scores = two_ranks.status(), two_ranks.scores(prompts)
    for in_flight in ("continue", "drain", "retract"):
        status, body = two_ranks.server.request("PUT", f"{API}/mask?in_flight={in_flight}", json.loads(masks["D"].dump()))
        assert (status, body["error"]["type"], body["error"]["message"]) == (409, "planted", "process 1: this rank refuses")
    assert two_ranks.status() == before
    assert two_ranks.scores(prompts) == scores
    assert two_ranks.switch(masks["B"], "retract") == before["mask_epoch"] + 1
    assert two_ranks.switch(masks["A"], "drain") == before["mask_epoch"] + 2
    assert two_ranks.scores(prompts) == scores


@pytest.mark.parametrize("path", ["softprune/switch", "softprune%2Fswitch", "softprune%252Fswitch"])
def test_no_switch_past_the_key(two_ranks: Client, path: str) -> None:
    """SGLang's own route for the message that carries ours, where it is open, does not reach it."""
    before = two_ranks.status()
    status, _ = two_ranks.server.request("POST", f"/dumper/{path}", {"text": None, "in_flight": "continue"}, key="")
    assert status in (400, 404)
    assert two_ranks.status() == before


def test_with_one_cache_for_all_masks_mixed_kv_is_found(two_ranks: Client, masks: Any, evidence: Evidence) -> None:
    """The mutation: the test above can fail."""
    prompt = random_prompts(1, 3 * CHUNK, seed=3)[0]
    found = mixed_then_asked(two_ranks, masks, prompt)
    evidence("sglang_cpu.live.one_cache", found)
    assert found["hit"] > len(prompt)
    assert found["difference"] > 0.1
