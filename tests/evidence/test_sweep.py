"""One vLLM, never restarted: statistics, three rankings, a sweep of four numbers kept over two packs, and a recipe carried out to the end.

Run alone: pytest tests/evidence/test_sweep.py (about twenty minutes on two cores)
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from softprune.bench.tiny.weights import TRAINED
from softprune.checkpoint.verify import verify_checkpoint
from softprune.evaluate import evaluation
from softprune.evaluate.packing import UNION
from softprune.server_client import ServerClient
from softprune.stats.file import read_header
from tests.conftest import Evidence, random_mask
from tests.engines.harness import BASE_ENV, VllmServer
from tests.sweeping import KEEPS, METHODS, PACKS, SEQ_LEN, files, prepare, shown, softprune, sweep, sweeps

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3000)]
MIN_TOKENS, SECONDS = 16_000, 30 * 60


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    prepare(root)
    return root


@pytest.fixture(scope="module")
def server(models: dict[str, Path], work: Path) -> Iterator[VllmServer]:
    # vLLM's call that takes and answers ids is open then, by which evaluations are faster.
    arguments = ["--softprune-stats", "eaft", "--max-model-len", str(SEQ_LEN + 16), "--enable-scale-out"]
    with VllmServer(models["gpt-oss"], *arguments, log=work / "server.log") as one:
        one.wait_ready(400)
        yield one


def test_a_sweep(server: VllmServer, work: Path, evidence: Evidence) -> None:
    url, key, before = f"http://127.0.0.1:{server.port}", server.key or "", time.monotonic()
    client, process = ServerClient(url, key), server.process.pid
    decode = ["--decode-batch", 8, "--decode-tokens", 32]
    sweep(url, key, work, Path(server.model), decode)
    seconds = time.monotonic() - before
    document, cells = sweeps(url, key, work, Path(server.model), decode)
    total = time.monotonic() - before
    softprune(key, "report", work / "sweep", "-o", work / "sweep.html")
    assert (server.process.poll(), server.process.pid) == (None, process)
    assert client.status()["mask"] is None
    assert len(document["cells"]) == len(KEEPS) * len(METHODS)
    tokens = {}
    for cell in [{"label": "base", "evaluation": "base.json"}, *document["cells"]]:
        found = evaluation.read(work / "sweep" / cell["evaluation"])
        tokens[cell["label"]] = {pack: found.cell(pack, SEQ_LEN).tokens for pack in (*PACKS, UNION)}
    least = min(count for one in tokens.values() for count in one.values())
    sizes = {"least_tokens": least, "tokens": tokens["base"]}
    evidence("sweep.vllm_cpu", {"seconds": seconds, "total_seconds": total, **sizes, "cells": cells})
    assert least >= MIN_TOKENS
    assert seconds < SECONDS
    first = shown(document)
    for method in ("reap", "eaft_reap"):
        values = [first[f"{method} keep {keep}"]["ppl"][f"{UNION}@{SEQ_LEN}"] for keep in KEEPS]
        assert values == sorted(values), f"{method}: perplexity does not grow as experts go: {values}"
    assert all(cells[f"{method} keep 16"]["verdict"] == "FAIL" for method in METHODS)
    assert all(cell["verdict"] in ("PASS", "FAIL") for cell in cells.values()), "too few tokens to judge"


def test_a_recipe_carried_out_on_the_server(server: VllmServer, work: Path, evidence: Evidence) -> None:
    """From its traffic to a checkpoint that was gated twice; a mask that fails is taken back, and nothing is rewritten."""
    url, key = f"http://127.0.0.1:{server.port}", server.key or ""
    client = ServerClient(url, key)
    mask = random_mask(Path(server.model), 30)
    client.put_mask(mask)
    recipe = work / "recipe.yaml"
    recipe.write_text(
        "schema_version: 1\nkind: reap_recipe\nname: tiny-keep28\nmodel: {base_model_id: tiny, keep_n: 28, num_experts: 32}\n"
        f"scoring: {{method: eaft_reap}}\nsource: {{model_path: {TRAINED}}}\n"
    )
    arguments = [
        "run", recipe, "--url", url, *files(work, "collected"), *files(work, "scored", "--eval-packs"), "--collect-blocks", 8,
        "--seq-lens", SEQ_LEN, "--num-blocks", 8, "--engine-args", "--enforce-eager",
    ]  # fmt: skip
    out = work / "first" / "out"
    said = softprune(key, *arguments, "--gates", work / "strict.json", "--out", out, code=1, env=BASE_ENV)
    assert "was taken back" in said
    assert not out.exists()
    assert client.status()["mask"]["hash"] == mask.hash
    shutil.copytree(work / "first", work / "second")
    out = work / "second" / "out"
    arguments += ["--gates", work / "wide.json", "--out", out]
    said = softprune(key, *arguments, env=BASE_ENV)
    assert "collect: skipped" in said
    assert verify_checkpoint(TRAINED, out).problems == []
    masked, rewritten = (json.loads((work / "second" / f"out.{name}.gate.json").read_text()) for name in ("masked", "rewritten"))
    assert (masked["verdict"], rewritten["verdict"]) == ("PASS", "PASS")
    assert client.status()["mask"]["hash"] == masked["candidate"]["mask"]
    ppl = {
        name: evaluation.read(work / "second" / f"out.{name}.json").cell(UNION, SEQ_LEN).metrics["ppl"]
        for name in ("base", "masked", "rewritten")
    }
    assert ppl["rewritten"] == pytest.approx(ppl["masked"], rel=0.003)
    header = read_header(work / "second" / "out.rewritten.stats.safetensors")
    assert header.model.num_experts == 28
    assert {name: header.tokens[name].prefill for name in PACKS} == dict.fromkeys(PACKS, 8 * 1024)
    skipped = softprune(key, *arguments, env=BASE_ENV).count("skipped")
    evidence("run.vllm_cpu", {"ppl": ppl, "skipped_the_second_time": skipped})
    assert skipped >= 7
