"""One vLLM, never restarted: statistics, three rankings, a sweep of four numbers kept over two packs, and a recipe carried out to the end.

Run alone: pytest tests/evidence/test_sweep.py (about twenty-five minutes on two cores)
Statistics come from the second half of each pack, evaluations from the first. The gates are near-lossless-v1's, at the length that the
small model was trained on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softprune.bench.tiny.weights import HERE as TINY
from softprune.bench.tiny.weights import TRAINED
from softprune.checkpoint.verify import verify_checkpoint
from softprune.evaluate import evaluation, gates
from softprune.evaluate.packing import UNION, read_rows
from softprune.server_client import ServerClient
from softprune.stats.file import read_header
from tests.conftest import Evidence, random_mask
from tests.engines.harness import BASE_ENV, VllmServer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]
PACKS, METHODS, KEEPS, SEQ_LEN = ("chat_if", "code"), ("reap", "eaft_reap", "frequency"), (28, 24, 20, 16), 1024
HALF, BLOCKS, MIN_TOKENS = 400, 38, 16_000
SECONDS = 30 * 60
RESULTS = Path("bench/results")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both halves of each pack, and the gates."""
    root = tmp_path_factory.mktemp("sweep")
    for name in PACKS:
        rows = list(read_rows(TINY / "packs" / f"{name}.parquet"))
        for half, part in (("scored", rows[:HALF]), ("collected", rows[HALF:])):
            (root / half).mkdir(exist_ok=True)
            pq.write_table(pa.table({"text": part}), root / half / f"{name}.parquet")
    rules = gates.read(gates.NEAR_LOSSLESS).model_dump() | {"name": "near-lossless-v1 at 1024", "primary_seq_lens": [SEQ_LEN]}
    (root / "gates.json").write_text(json.dumps(rules))
    (root / "wide.json").write_text(json.dumps(rules | {
        "name": "wide", "max_abs_delta_ppl": 9.0, "max_rel_delta_ppl": 9.0, "max_abs_delta_cc_rate": 1.0, "max_abs_delta_mean_prob": 1.0,
        "max_js2d": 0.7,
    }))  # fmt: skip
    return root


@pytest.fixture(scope="module")
def server(models: dict[str, Path], work: Path) -> Iterator[VllmServer]:
    arguments = ["--softprune-stats", "eaft", "--max-model-len", str(SEQ_LEN + 16)]
    with VllmServer(models["gpt-oss"], *arguments, log=work / "server.log") as one:
        one.wait_ready(400)
        yield one


def softprune(server: VllmServer, *arguments: object, code: int = 0) -> str:
    command = [str(Path(sys.executable).parent / "softprune"), *map(str, arguments)]
    env = {**os.environ, **BASE_ENV, "SOFTPRUNE_KEY": server.key or "", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=2200, env=env)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def packs(work: Path, half: str) -> list[object]:
    return [part for name in PACKS for part in ("--packs", work / half / f"{name}.parquet")]


def test_a_sweep(server: VllmServer, work: Path, evidence: Evidence) -> None:
    url, before = f"http://127.0.0.1:{server.port}", time.monotonic()
    client = ServerClient(url, server.key)
    mask = random_mask(Path(server.model), 30)
    client.put_mask(mask)
    process = server.process.pid
    client.switch(None)
    softprune(
        server,
        "stats",
        "collect",
        "--url",
        url,
        *packs(work, "collected"),
        "--mode",
        "eaft",
        "--num-blocks",
        16,
        "-o",
        work / "stats.safetensors",
    )
    for method in METHODS:
        softprune(server, "rank", work / "stats.safetensors", "--method", method, "-o", work / f"{method}.yaml")
    client.put_mask(mask)
    scores = [part for method in METHODS for part in ("--scores", work / f"{method}.yaml")]
    softprune(
        server, "sweep", "--url", url, *packs(work, "scored"), *scores, "--keep", ",".join(map(str, KEEPS)), "--seq-lens", SEQ_LEN,
        "--num-blocks", BLOCKS, "--gates", work / "gates.json", "--decode-batch", 8, "--decode-tokens", 32, "--out", work / "sweep",
    )  # fmt: skip
    seconds = time.monotonic() - before
    assert server.process.poll() is None
    assert server.process.pid == process
    assert client.status()["mask"]["hash"] == mask.hash
    document = json.loads((work / "sweep" / "sweep.json").read_text())
    assert len(document["cells"]) == len(KEEPS) * len(METHODS)
    tokens = {}
    for cell in [{"label": "base", "evaluation": "base.json"}, *document["cells"]]:
        found = evaluation.read(work / "sweep" / cell["evaluation"])
        tokens[cell["label"]] = {pack: found.cell(pack, SEQ_LEN).tokens for pack in (*PACKS, UNION)}
    least = min(count for one in tokens.values() for count in one.values())
    softprune(server, "report", work / "sweep", "-o", work / "sweep.html")
    cells = {cell["label"]: {name: cell[name] for name in ("verdict", "ppl", "rel_ppl", "decode", "pareto")} for cell in document["cells"]}
    evidence("sweep.vllm_cpu", {"seconds": seconds, "least_tokens": least, "tokens": tokens["base"], "cells": cells})
    assert least >= MIN_TOKENS
    assert seconds < SECONDS
    by_keep = {method: [cells[f"{method} keep {keep}"]["ppl"][f"{UNION}@{SEQ_LEN}"] for keep in KEEPS] for method in ("reap", "eaft_reap")}
    for method, values in by_keep.items():
        assert values == sorted(values), f"{method}: perplexity does not grow as experts go: {values}"
    assert all(cells[f"{method} keep 16"]["verdict"] == "FAIL" for method in METHODS)


def test_a_recipe_carried_out_on_the_server(server: VllmServer, work: Path, evidence: Evidence) -> None:
    """From its traffic to a checkpoint that was gated twice; a mask that fails is taken back, and nothing is rewritten."""
    url = f"http://127.0.0.1:{server.port}"
    client = ServerClient(url, server.key)
    client.switch(None)
    recipe = work / "recipe.yaml"
    recipe.write_text(
        "schema_version: 1\nkind: reap_recipe\nname: tiny-keep28\nmodel: {base_model_id: tiny, keep_n: 28, num_experts: 32}\n"
        f"scoring: {{method: eaft_reap}}\nsource: {{model_path: {TRAINED}}}\n"
    )
    scored = [part for name in PACKS for part in ("--eval-packs", work / "scored" / f"{name}.parquet")]
    arguments = [
        "run", recipe, "--url", url, *packs(work, "collected"), *scored, "--collect-blocks", 8, "--seq-lens", SEQ_LEN, "--num-blocks", 8,
        "--engine-args", "--enforce-eager",
    ]  # fmt: skip
    out = work / "strict" / "out"
    said = softprune(server, *arguments, "--gates", work / "gates.json", "--out", out, code=1)
    assert "was taken back" in said
    assert not out.exists()
    assert client.status()["mask"] is None
    # The first run pinned its statistics; those are the same, wherever they lie.
    shutil.copytree(work / "strict", work / "wide")
    out = work / "wide" / "out"
    said = softprune(server, *arguments, "--gates", work / "wide.json", "--out", out)
    assert "collect: skipped" in said
    assert verify_checkpoint(TRAINED, out).problems == []
    masked, rewritten = (json.loads((work / "wide" / f"out.{name}.gate.json").read_text()) for name in ("masked", "rewritten"))
    assert (masked["verdict"], rewritten["verdict"]) == ("PASS", "PASS")
    assert client.status()["mask"]["hash"] == masked["candidate"]["mask"]
    ppl = {
        name: evaluation.read(work / "wide" / f"out.{name}.json").cell(UNION, SEQ_LEN).metrics["ppl"]
        for name in ("base", "masked", "rewritten")
    }
    assert ppl["rewritten"] == pytest.approx(ppl["masked"], rel=0.003)
    header = read_header(work / "wide" / "out.rewritten.stats.safetensors")
    assert header.model.num_experts == 28
    assert {name: header.tokens[name].prefill for name in PACKS} == dict.fromkeys(PACKS, 8 * 1024)
    again = softprune(server, *arguments, "--gates", work / "wide.json", "--out", out)
    evidence("run.vllm_cpu", {"ppl": ppl, "skipped_the_second_time": again.count("skipped")})
    assert again.count("skipped") >= 7
