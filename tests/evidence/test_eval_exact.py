"""Evaluation by a real vLLM on the CPU, against Transformers on the same tokens, against itself, and through the gate.

Run alone: pytest tests/evidence/test_eval_exact.py
The trained gpt-oss: committed as MXFP4, served dequantised in BF16; the reference computes in float32.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from rich.console import Console

from softprune.bench.tiny import PACKS
from softprune.bench.tiny.weights import HERE as TINY
from softprune.bench.tiny.weights import TRAINED
from softprune.errors import InputError
from softprune.evaluate import evaluation, gates
from softprune.evaluate.eval_packs import PackSet, Sizes, load
from softprune.evaluate.evaluate import EvalSettings, evaluate
from softprune.evaluate.gate_result import GateResult
from softprune.evaluate.js2d import paired
from softprune.evaluate.metrics import Accumulator, MetricSettings
from softprune.evaluate.noise import no_op, noise_floor
from softprune.evaluate.packing import UNION
from softprune.evaluate.pair import compare
from softprune.evaluate.plane import decode_cells
from softprune.evaluate.prompt_scores import PromptScorer, TokenScores
from softprune.evaluate.reference import load_reference, score
from softprune.evaluate.served import ask_served
from softprune.server_client import ServerCallError, ServerClient
from tests.conftest import Evidence, random_mask
from tests.engines.harness import BASE_ENV, VllmServer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
FILES = [TINY / "packs" / f"{name}.parquet" for name in PACKS]
SIZES = Sizes((1024, 2048), num_blocks=8)
GATES = gates.read(gates.NEAR_LOSSLESS)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def packs() -> PackSet:
    """UNION alone, which the gates judge."""
    loaded = load(FILES, str(TINY / "tokenizer"), SIZES)
    return replace(loaded, cells={UNION: loaded.cells[UNION]})


@pytest.fixture(scope="module")
def served(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerClient]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with VllmServer(models["gpt-oss"], "--softprune-control", "--max-model-len", "2064", "--enable-scale-out", log=log) as server:
        server.wait_ready(300)
        yield ServerClient(f"http://127.0.0.1:{server.port}", server.key)


@pytest.fixture(scope="module")
def noise(served: ServerClient, packs: PackSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GateResult]:
    folder = tmp_path_factory.mktemp("noise")
    return folder, noise_floor(served, packs, folder, EvalSettings(label="base"), GATES, 1, QUIET, print)


def figures(result: GateResult) -> dict[str, dict[str, object]]:
    """The largest of everything, by row."""
    return {
        f"{row.pack}@{row.seq_len}": {
            **{name: [one.value, one.low, one.high] for name, one in row.delta.items()},
            "js2d": [row.js2d.raw, row.js2d.bias, row.js2d.corrected], "js2d_coarse": [row.coarse.raw, row.coarse.corrected],
            "tokens": row.base["tokens"],
        }
        for row in result.rows
    }  # fmt: skip


def test_against_transformers(noise: tuple[Path, GateResult], packs: PackSet, models: dict[str, Path], evidence: Evidence) -> None:
    found, model = evaluation.read(noise[0] / "first.json"), load_reference(models["gpt-oss"])
    rows = {}
    for pack, by_length in packs.cells.items():
        for seq_len, blocks in by_length.items():
            scores, accumulator = score(model, blocks.ids, entropies=True), Accumulator(MetricSettings())
            assert scores.top_entropy is not None
            for log_p, entropy, keep in zip(scores.log_p, scores.top_entropy, blocks.keep, strict=True):
                accumulator.add_block(log_p[keep], entropy[keep])
            expected, cell = accumulator.cell(), found.cell(pack, seq_len)
            assert cell.blocks is not None
            own = expected["softprune"]["blocks"]
            assert cell.blocks.tokens.tolist() == own["tokens"]
            planes = [found.plane.coarse(cells) for cells in (decode_cells(own["cells"], cell.tokens), cell.blocks.cells)]
            fine = paired(decode_cells(own["cells"], cell.tokens), cell.blocks.cells, cell.blocks.tokens, 0)
            coarse = paired(planes[0], planes[1], cell.blocks.tokens, 0)
            rows[f"{pack}@{seq_len}"] = {
                "tokens": cell.tokens, "ppl": expected["ppl"], "ppl_relative": cell.metrics["ppl"] / expected["ppl"] - 1,
                "mean_prob": cell.metrics["mean_prob"] - expected["mean_prob"],
                "mean_entropy": cell.metrics["mean_entropy"] - expected["mean_entropy"],
                "cc_rate": cell.metrics["cc_rate"] - expected["cc_rate"],
                "js2d": fine.raw, "js2d_bias": fine.bias, "js2d_coarse": coarse.raw, "js2d_coarse_bias": coarse.bias,
            }  # fmt: skip
    evidence("eval.exact.over_transformers", rows)
    for one in rows.values():
        assert abs(one["ppl_relative"]) < 0.003
        assert abs(one["mean_prob"]) < 0.002
        assert abs(one["mean_entropy"]) < 0.01
        # Of so few tokens the raw value is mostly their scatter among 1,200 cells.
        assert one["js2d_coarse"] - one["js2d_coarse_bias"] < 0.002


def test_base_against_base(noise: tuple[Path, GateResult], served: ServerClient, packs: PackSet, evidence: Evidence) -> None:
    """In other batches and another order, of which BF16 makes a difference; one at a time, twice; and against its own file."""
    folder, result = noise
    evidence("eval.exact.noise_floor", figures(result))
    assert result.verdict == "PASS"
    for row in result.rows:
        assert abs(row.delta["rel_ppl"].value) < 1e-3  # where batches differ, of 95 % intervals one in twenty does not hold 0
    second = evaluation.read(folder / "second.json")
    again = evaluate(served, packs, folder / "again.json", EvalSettings(label="again", concurrency=1))
    repeated = compare(second, again, GATES)
    evidence("eval.exact.base_against_base", figures(repeated))
    for one in (repeated, compare(second, second, GATES)):
        assert one.verdict == "PASS"
        for row in one.rows:
            for name, delta in row.delta.items():
                assert delta.low is not None
                assert delta.high is not None
                assert delta.low <= 0 <= delta.high, (row.pack, row.seq_len, name)


def test_the_call_that_takes_ids_is_faster(served: ServerClient, packs: PackSet, evidence: Evidence) -> None:
    """vLLM's front end writes no texts then; the same scores, in turns."""
    of_ids, blocks = ask_served(served), packs.cells[UNION][1024]
    assert of_ids.takes_tokens
    seconds: dict[str, list[float]] = {"ids": [], "completions": []}
    scores: dict[str, list[TokenScores]] = {}
    for name in ("ids", "completions", "completions", "ids", "ids", "completions", "completions", "ids"):
        scorer = PromptScorer(served, of_ids if name == "ids" else replace(of_ids, takes_tokens=False))
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            scores[name] = list(pool.map(scorer.score, blocks.ids, blocks.keep))
        seconds[name].append(time.monotonic() - began)
    # Batches differ from pass to pass, which BF16 makes a difference of.
    for one, other in zip(*scores.values(), strict=True):
        assert abs(one.log_p.mean() - other.log_p.mean()) < 0.01
    faster = median(seconds["completions"]) / median(seconds["ids"])
    evidence("eval.by_ids_over_completions", {"blocks": len(blocks.ids), "seconds": seconds, "faster": faster})
    assert faster > 1.05


def test_random_pruning_fails(
    noise: tuple[Path, GateResult], served: ServerClient, packs: PackSet, models: dict[str, Path], tmp_path: Path, evidence: Evidence
) -> None:
    mask = random_mask(models["gpt-oss"], 16, seed=3)
    served.put_mask(mask)
    pruned = evaluate(served, packs, tmp_path / "keep16.json", EvalSettings(label="keep 16"))
    served.switch(None)
    result = compare(evaluation.read(noise[0] / "first.json"), pruned, GATES)
    evidence("eval.exact.keep16_random", figures(result))
    assert (pruned.own["mask"], pruned.own["num_kept"]) == (mask.hash, [16] * 4)
    assert result.verdict == "FAIL"
    assert [row.passed for row in result.rows] == [False, False]


def test_a_rewrite_of_all_experts_passes(packs: PackSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evidence: Evidence) -> None:
    for name, value in BASE_ENV.items():
        monkeypatch.setenv(name, value)
    # One at a time, so that batches do not differ: what is left is the rewrite's.
    result = no_op(TRAINED, packs, tmp_path / "no-op", EvalSettings(concurrency=1), GATES, "vllm", ["--enforce-eager"], QUIET, print)
    evidence("eval.exact.no_op", figures(result))
    assert result.verdict == "PASS"
    assert result.base["fingerprint"] == result.candidate["fingerprint"]
    for row in result.rows:
        for delta in row.delta.values():
            assert delta.low is not None
            assert delta.high is not None
            assert delta.low <= 0 <= delta.high


def test_a_server_without_softprune_and_with_less(models: dict[str, Path], tmp_path: Path) -> None:
    """No tokenizer, one likeliest token too few: both are said, and what it can give is evaluated."""
    small = load(FILES, str(TINY / "tokenizer"), Sizes((256,), 4), with_union=False)
    told: list[str] = []
    with VllmServer(models["gpt-oss"], "--max-logprobs", "19", "--skip-tokenizer-init", log=tmp_path / "server.log") as server:
        server.wait_ready(300)
        client = ServerClient(f"http://127.0.0.1:{server.port}")
        with pytest.raises(
            ServerCallError, match="max allowed: 19 .*20 likeliest tokens are needed: start the server with --max-logprobs 20"
        ):
            evaluate(client, small, tmp_path / "x.json", tell=told.append)
        found = evaluate(client, small, tmp_path / "y.json", EvalSettings(MetricSettings(entropy_topk=19)), tell=told.append)
        too_long = load(FILES, str(TINY / "tokenizer"), Sizes((2048,), 1), with_union=False)
        with pytest.raises(ServerCallError, match=r"found a context of 2048 tokens; expected at least 2049"):
            evaluate(client, too_long, tmp_path / "z.json")
        # A token that the model does not have, which would end this engine.
        ids = small.cells["code"][256].ids.copy()
        ids[:, -1] = 4096
        other = {"code": {256: replace(small.cells["code"][256], ids=ids)}}
        with pytest.raises(InputError, match=r"--tokenizer: found token 4096; expected ids below 4096, the vocabulary of .*gpt-oss"):
            evaluate(client, replace(small, cells=other), tmp_path / "w.json")
    assert len(told) == 2
    assert "does not tokenise" in told[0]
    assert (found.own["fingerprint"], found.meta["top_k"], found.meta["vllm_version"]) == (None, None, "0.32.0")
    assert np.isfinite([cell.metrics["ppl"] for cell in found.cells.values()]).all()
