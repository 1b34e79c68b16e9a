"""A real vLLM server, started with `--expert-mask`, over HTTP.

Run alone: pytest tests/engines/test_serving.py
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.evaluate.errors import EvaluationError
from softprune.evaluate.prompt_scores import PromptScorer
from softprune.evaluate.served import ask_served
from softprune.server_client import ServerCallError, ServerClient
from tests.conftest import Evidence, heldout_prompts
from tests.engines.conftest import Masked

pytestmark = pytest.mark.engine


def test_status_says_what_is_served(masked: Masked) -> None:
    status, body = masked.server.request("GET", "/softprune/v1/status")
    assert status == 200
    assert body["mask"] == {"hash": masked.mask.hash, "num_kept": masked.mask.num_kept}
    assert body["top_k"] == 4
    assert body["fingerprint"] == fingerprint_of_checkpoint(masked.server.model)
    assert body["engine"].startswith("vLLM ")


def test_concurrent_requests_never_reach_pruned_experts(masked: Masked, evidence: Evidence) -> None:
    """Over 10,000 tokens in 32 requests at a time: the probe's total is tokens x top_k, layer by layer, exactly."""
    prompts, max_tokens = heldout_prompts(96, 96, seed=21), 16
    masked.server.request("DELETE", "/softprune/v1/routes")
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda prompt: masked.server.complete(prompt, max_tokens), prompts))
    # A request's last token is sampled but never computed on.
    computed = sum(answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"] - 1 for answer in answers)
    assert computed > 10_000
    status, routes = masked.server.request("GET", "/softprune/v1/routes")
    assert status == 200
    evidence("vllm_cpu.http.routes.masked", {"requests": len(prompts), "tokens": computed, "selections": sum(map(sum, routes["counts"]))})
    for layer, counts in enumerate(routes["counts"]):
        assert routes["tokens"][layer] == computed
        assert sum(counts) == computed * masked.mask.layer_top_k(layer)
        assert [i for i, count in enumerate(counts) if count == 0 and i in masked.mask.kept(layer)] == []
        assert sum(counts[i] for i in masked.mask.pruned(layer)) == 0


def test_scores_are_the_same_by_the_call_that_takes_ids(masked: Masked) -> None:
    """With the epoch that both answers name; ids that the model has not are refused in both."""
    client = ServerClient(f"http://127.0.0.1:{masked.server.port}", masked.server.key)
    served = ask_served(client)
    assert served.takes_tokens
    ids = np.array(heldout_prompts(1, 200, seed=22)[0], np.int32)
    keep = np.arange(len(ids)) > 0
    by_ids, by_text = (PromptScorer(client, one).score(ids, keep) for one in (served, replace(served, takes_tokens=False)))
    assert np.array_equal(by_ids.log_p, by_text.log_p)
    assert np.array_equal(by_ids.entropy, by_text.entropy)
    for one in (served, replace(served, takes_tokens=False)):
        with pytest.raises(ServerCallError, match="out of vocabulary"):
            PromptScorer(client, one).score(np.array([1, 4096], np.int32), np.array([False, True]))
        with pytest.raises(EvaluationError, match="an answer under mask epochs"):
            PromptScorer(client, replace(one, status={**(one.status or {}), "mask_epoch": 7})).score(ids, keep)


@pytest.mark.parametrize("path", ["/status", "/routes", "", "/", "/anything"])
@pytest.mark.parametrize("key", ["", "wrong", "test-key ", "test-keyy", "TEST-KEY"])
def test_no_call_without_the_key(masked: Masked, path: str, key: str) -> None:
    status, body = masked.server.request("GET", "/softprune/v1" + path, key=key)
    assert (status, body["error"]["type"]) == (401, "unauthorized")


def test_unknown_calls_are_named(masked: Masked) -> None:
    status, body = masked.server.request("POST", "/softprune/v1/status", {})
    assert (status, body["error"]["type"]) == (404, "not_found")


def test_the_engines_own_api_is_untouched(masked: Masked) -> None:
    status, body = masked.server.request("GET", "/v1/models", key="")
    assert status == 200
    assert body["data"][0]["id"] == masked.server.model


def test_the_key_is_not_logged(masked: Masked) -> None:
    assert "test-key" not in masked.server.text()
