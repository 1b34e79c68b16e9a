"""Switching the mask of a real vLLM server: prefix caches, state files, and two tensor-parallel ranks.

Run alone: pytest tests/evidence/test_vllm_live.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from softprune.mask import ExpertMask
from tests.conftest import Evidence, heldout_prompts, random_mask, random_prompts, saved
from tests.engines.harness import API, Live, VllmServer, scores
from tests.gpu.compare import gap

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def live_masks(models: dict[str, Path]) -> list[ExpertMask]:
    return [random_mask(models["gpt-oss"], keep, seed=seed) for keep, seed in ((24, 11), (16, 12), ([20, 4, 32, 11], 13))]


@dataclass
class Cached:
    """A Qwen3-MoE server, started from a state file; its cache finds generated tokens too, which vLLM's does not where a window slides."""

    live: Live
    state: Path
    no_names: Path


@pytest.fixture(scope="module")
def cached(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cached]:
    folder = tmp_path_factory.mktemp("cached")
    masks = [random_mask(models["qwen3-moe"], keep, seed=seed) for keep, seed in ((9, 11), (6, 12), (8, 13))]
    state, no_names = folder / "state.json", folder / "no_names"
    state.write_text(json.dumps({"format": "softprune.mask-state", "version": 1, "mask": json.loads(masks[2].dump())}))
    args = [
        "--enable-prompt-tokens-details",
        "--block-size",
        "32",
        "--max-num-batched-tokens",
        "64",
        "--expert-mask",
        saved(masks[0], folder / "a.json"),
    ]
    env = {"SOFTPRUNE_TEST_ONE_CACHE": str(no_names), "SOFTPRUNE_TEST_PAUSE": "0.01"}
    with VllmServer(models["qwen3-moe"], *args, "--expert-mask-state", str(state), log=folder / "log", env=env) as server:
        server.wait_ready()
        yield Cached(Live(server, masks), state, no_names)


def across_switches(live: Live, a: ExpertMask, b: ExpertMask, seed: int) -> list[int]:
    """A prompt and the answer to it that ran under a, then b, then a again."""
    prompt = random_prompts(1, 150, seed=seed)[0]
    live.put(a)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(live.server.complete, prompt, 500, return_token_ids=True)
        for mask in (b, a):
            time.sleep(0.5)
            live.put(mask)
        answer = running.result(120)
    assert len(answer["softprune"]["epochs"]) == 3
    return [*prompt, *answer["choices"][0]["token_ids"]]


def test_the_start_mask_is_that_of_the_state_file(cached: Cached) -> None:
    status = cached.live.status()
    assert (status["mask"]["hash"], status["after_restart"]) == (cached.live.masks[2].hash, "the mask in force")
    assert status["launch_mask"] == cached.live.masks[2].hash
    cached.live.put(cached.live.masks[1])
    assert ExpertMask.parse(json.loads(cached.state.read_text())["mask"], "").hash == cached.live.masks[1].hash
    cached.live.put(None)
    assert json.loads(cached.state.read_text())["mask"] is None
    assert "a restart returns" not in cached.live.server.text()


@pytest.mark.timeout(200)
def test_without_names_the_cache_would_mix(cached: Cached, evidence: Evidence) -> None:
    """The next test, seen red: caches are not named, and requests that cross a switch cache on."""
    live, (a, b, _) = cached.live, cached.live.masks
    cached.no_names.touch()
    whole = across_switches(live, a, b, seed=71)
    found, hits = live.first_token(whole)
    mixed = gap(found, live.first_token(whole, cache_salt="never seen")[0])
    live.put(b)
    assert live.first_token(whole)[1] > 0, "KV of another mask"
    cached.no_names.unlink()
    evidence("vllm_cpu.live.cache_without_names", {"prompt": len(whole), "cached": hits, "gap_to_uncached": mixed})
    assert hits > 600
    assert mixed is None or mixed > 0.01


@pytest.mark.timeout(200)
def test_prefix_caches_never_mix_masks(cached: Cached, evidence: Evidence) -> None:
    """KV of a request that crossed a switch is found by nobody, and that of another mask neither."""
    live, (a, b, _) = cached.live, cached.live.masks
    whole = across_switches(live, a, b, seed=72)
    found, hits = live.first_token(whole)
    fresh, none = live.first_token(whole, cache_salt="never seen in this test")
    again, hits_again = live.first_token(whole)
    live.put(b)
    under_b, hits_b = live.first_token(whole)
    fresh_b, _ = live.first_token(whole, cache_salt="not seen either")
    live.put(a)
    back, hits_back = live.first_token(whole)
    live.put(None)
    _, hits_none = live.first_token(whole)
    evidence("vllm_cpu.live.cache", {
        "prompt": len(whole), "cached": {"after crossing": hits, "again": hits_again, "under b": hits_b, "back under a": hits_back},
        "gap_to_uncached": {"after crossing": gap(found, fresh), "again": gap(again, fresh), "back under a": gap(back, fresh)},
        "gap_of_b_to_a": gap(under_b, fresh),
    })  # fmt: skip
    assert 0 < hits < 500, "what was computed before the first switch, and no more"
    assert (none, hits_b, hits_none) == (0, 0, 0)
    assert min(hits_again, hits_back) > 600, "hits where they are due; switching back finds the old entries"
    assert found == again == back == fresh, "to the last bit what an empty cache gives"
    assert under_b == fresh_b != fresh


def test_a_prefill_that_crosses_a_switch_is_found_by_nobody(cached: Cached) -> None:
    """Half of its KV is of one mask and half of the other."""
    live, (a, b, _) = cached.live, cached.live.masks
    prompt = random_prompts(1, 1600, seed=73)[0]
    live.put(a)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(live.server.complete, prompt, 1)
        time.sleep(0.15)
        live.put(b)
        assert len(running.result(60)["softprune"]["epochs"]) == 2
    for mask, due in ((b, range(1)), (a, range(1, 1400))):
        live.put(mask)
        found, hits = live.first_token(prompt)
        assert hits in due
        assert found == live.first_token(prompt, cache_salt=f"prefill {mask.hash}")[0]


@pytest.mark.timeout(400)
def test_every_rank_or_none(models: dict[str, Path], live_masks: list[ExpertMask], tmp_path: Path) -> None:
    """Tensor parallel 2: if one rank refuses, neither switches and the engine serves on; if one dies, nothing is served any more."""
    order = tmp_path / "order"
    order.write_text("")
    state = tmp_path / "state.json"
    a, b, _ = live_masks
    args = ["--tensor-parallel-size", "2", "--expert-mask", saved(a, tmp_path / "a.json"), "--expert-mask-state", str(state)]
    env = {"SOFTPRUNE_TEST_RANK_1": str(order), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    prompts = heldout_prompts(2, 64, seed=91)
    with VllmServer(models["gpt-oss"], *args, "--softprune-debug-routes", log=tmp_path / "log", env=env) as server:
        server.wait_ready()
        live = Live(server, live_masks)
        under_a = scores(server, prompts)
        assert live.put(b)["epoch"] == 1
        assert live.put(a)["epoch"] == 2
        order.write_text("refuse")
        status, body = live.try_put(b)
        assert (status, body["error"]["message"]) == (409, "process 1: planted: no")
        now = live.status()
        assert (now["mask"]["hash"], now["mask_epoch"]) == (a.hash, 2)
        assert scores(server, prompts) == under_a
        routes = server.request("GET", API + "/routes")[1]
        assert all(sum(counts[i] for i in a.pruned(layer)) == 0 for layer, counts in enumerate(routes["epochs"]["2"]["counts"]))
        order.write_text("die")
        assert live.try_put(b)[0] == 500
        assert ExpertMask.parse(json.loads(state.read_text())["mask"], "").hash == a.hash
        with pytest.raises((AssertionError, OSError)):
            server.complete(prompts[0], 4)
