"""Router statistics while vLLM's own serving benchmark streams chat requests, under two tags and across a switch of masks.

Run alone: pytest tests/evidence/test_stats_traffic.py
The benchmark is a client that knows nothing of softprune: it is told a header, and what it measured is held against what was counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softprune.server_client import ServerClient
from softprune.stats.file import Statistics, read
from softprune.stats.summary import complete
from tests.conftest import Evidence, random_mask
from tests.engines.harness import VllmServer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]
TAGS = ("chat", "code")
CONCURRENCY = 32
"""Requests at once under each tag: 64 together."""
PROMPTS = 256
# vLLM's command imports all of its parts, of which some crash on CPUs without certain instructions.
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def bench(server: VllmServer, tag: str, seed: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-c", BENCH, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url",
        f"http://127.0.0.1:{server.port}", "--model", server.model, "--tokenizer", server.model, "--dataset-name", "random",
        "--random-input-len", "60", "--random-output-len", "40", "--random-range-ratio", "0.5", "--num-prompts", str(PROMPTS),
        "--max-concurrency", str(CONCURRENCY), "--ignore-eos", "--temperature", "0", "--seed", str(seed), "--header",
        f"X-Softprune-Tag={tag}", "--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", f"{tag}.json",
        "--disable-tqdm", "--ready-check-timeout-sec", "0",
    ]  # fmt: skip
    with open(folder / f"{tag}.log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def test_serving_benchmark_across_a_switch(models: dict[str, Path], tmp_path: Path, evidence: Evidence) -> None:
    model = models["qwen3-moe"]
    mask = random_mask(model, 12, seed=9)
    with VllmServer(model, "--softprune-stats", "router", "--max-num-seqs", "64", log=tmp_path / "server.log") as server:
        server.wait_ready(300)
        client = ServerClient(f"http://127.0.0.1:{server.port}", server.key)
        before = [server.metric(f"vllm:{kind}_tokens_total") for kind in ("prompt", "generation")]
        client.start_stats()
        running = [bench(server, tag, seed, tmp_path) for seed, tag in enumerate(TAGS)]
        try:
            at_once, switched = _switch_under_way(server, client, running, mask)
            for one in running:
                one.wait(600)
        finally:
            for one in running:
                one.kill()
        state = client.stop_stats()
        files = {name: _fetch(client, name, tmp_path) for name in ("none", mask.hash)}
        prompt, generated = (
            server.metric(f"vllm:{kind}_tokens_total") - then for kind, then in zip(("prompt", "generation"), before, strict=True)
        )
        top_k = client.status()["top_k"]

    results = {tag: json.loads((tmp_path / f"{tag}.json").read_text()) for tag in TAGS}
    assert [one["completed"] for one in results.values()] == [PROMPTS] * 2, (tmp_path / "chat.log").read_text()[-2000:]
    assert (state["missed_tokens"], state["lost_samples"]) == (0, 0)
    for tag in TAGS:
        counted = [file.header.tokens[tag] for file in files.values()]
        # The last token of an answer is never run.
        assert sum(one.decode for one in counted) == sum(results[tag]["output_lens"]) - PROMPTS
        assert sum(one.prefill + one.cached for one in counted) == sum(results[tag]["input_lens"])  # as the server counted them
        assert min(one.routed for one in counted) > 0
        for file, tokens in zip(files.values(), counted, strict=True):
            assert (file["router.count"][file.tag_index(tag)].sum((0, 2)) == tokens.routed * top_k).all()
    everything = [tokens for file in files.values() for tokens in file.header.tokens.values()]
    assert sum(one.prefill + one.cached for one in everything) == prompt
    assert sum(one.decode for one in everything) == generated - 2 * PROMPTS
    assert all(complete(file) is True for file in files.values())
    assert [[one.epoch for one in file.header.epochs] for file in files.values()] == [[0], [1]]
    for layer in range(files["none"]["router.count"].shape[2]):
        assert files[mask.hash]["router.count"][:, :, layer, mask.pruned(layer)].sum() == 0
        assert (files["none"]["router.count"][:, :, layer].sum((0, 1)) > 0).all()
    evidence("stats.traffic.vllm", {
        "requests": 2 * PROMPTS, "running_at_the_switch": at_once, "prompt_tokens": prompt, "generated_tokens": generated,
        "routed": {name: {tag: file.header.tokens[tag].routed for tag in TAGS} for name, file in files.items()},
        "tokens_at_the_switch": switched, "selections": int(sum(np.sum(file["router.count"]) for file in files.values())),
    })  # fmt: skip


def _switch_under_way(server: VllmServer, client: ServerClient, running: list[Any], mask: Any) -> tuple[int, int]:
    """Put the mask in force when a third of the answers' tokens are there and both tags' requests are running; (requests, tokens) then."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        tokens = [count["decode"] for one in client.status()["statistics"]["masks"] for count in one["tokens"].values()]
        at_once = int(server.metric("vllm:num_requests_running"))
        if sum(tokens) > 2 * PROMPTS * 40 / 3 and at_once > 1.5 * CONCURRENCY:
            client.put_mask(mask)
            assert all(one.poll() is None for one in running)
            return at_once, sum(tokens)
        assert all(one.poll() in (None, 0) for one in running)
        time.sleep(0.1)
    raise AssertionError("the benchmarks did not begin")


def _fetch(client: ServerClient, mask: str, folder: Path) -> Statistics:
    (folder / "file").write_bytes(client.stats_file(mask))
    return read(folder / "file")
