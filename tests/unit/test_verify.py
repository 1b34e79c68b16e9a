"""`softprune verify` finds what is wrong: one flipped byte anywhere, and forgeries whose manifest was made to match."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprune.bench.tiny.weights import TRAINED
from softprune.checkpoint.headers import INDEX
from softprune.checkpoint.manifest import Manifest, Stored, read_manifest
from softprune.checkpoint.rewrite import rewrite
from softprune.checkpoint.synth import synth_checkpoint
from softprune.checkpoint.verify import verify_checkpoint
from softprune.errors import CheckpointError
from tests.conftest import random_mask

FLIPS = 4
"""Flipped bytes tried in each file, header and payload; make evidence tries many more."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    rewrite(TRAINED, random_mask(TRAINED, 24), tmp_path / "out", max_shard_bytes=4_000_000)
    return tmp_path / "out"


def flip(path: Path, position: int, change: int) -> None:
    """Change one byte; doing it again undoes it."""
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0] ^ change
        file.seek(position)
        file.write(bytes([byte]))


def flips_found(source: Path, out: Path, number: int, seed: int) -> int:
    """Flip so many random bytes of each file and each shard's header, one at a time; all have to be found. How many they were."""
    rng, tried = random.Random(seed), 0
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        size = path.stat().st_size
        spans = [(0, size)]
        if path.suffix == ".safetensors":
            spans.append((0, 8 + int.from_bytes(path.read_bytes()[:8], "little")))
        for start, end in spans * number:
            position, change = rng.randrange(start, end), rng.randrange(1, 256)
            flip(path, position, change)
            assert verify_checkpoint(source, out).problems, f"{path.name}, byte {position}, xor {change}"
            flip(path, position, change)
            tried += 1
    assert verify_checkpoint(source, out).problems == []
    return tried


def test_one_flipped_byte_is_found_wherever_it_is(out: Path) -> None:
    assert flips_found(TRAINED, out, FLIPS, seed=0) > 50


def test_one_flipped_byte_is_found_in_padding_and_single_experts(models: dict[str, Path], tmp_path: Path) -> None:
    rewrite(models["gpt-oss-mxfp4"], random_mask(models["gpt-oss-mxfp4"], [8, 4, 9, 4]), tmp_path / "padded", pad_to=10)
    rewrite(models["mixtral"], random_mask(models["mixtral"], 3), tmp_path / "single")
    assert flips_found(models["gpt-oss-mxfp4"], tmp_path / "padded", FLIPS, seed=1)
    assert flips_found(models["mixtral"], tmp_path / "single", FLIPS, seed=2)


def test_a_flipped_byte_of_the_source_is_found(out: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(TRAINED, tmp_path / "source"))
    shard = source / "model-00002-of-00002.safetensors"
    tensor = "model.layers.3.mlp.experts.down_proj_bias"
    data = shard.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    flip(shard, 8 + int.from_bytes(data[:8], "little") + header[tensor]["data_offsets"][0] + 512 * read_manifest(out).mask["keep"][3][0], 1)
    (problem,) = verify_checkpoint(source, out).problems
    assert f"{tensor}: found other bytes; expected the 512 of {shard.name} from byte" in str(problem)


def resign(out: Path, **changes: Any) -> None:
    """Make the manifest match what lies there, as a forger would."""
    manifest = read_manifest(out)
    files = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"):
        data = path.read_bytes()
        files[path.relative_to(out).as_posix()] = Stored(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (out / "manifest.json").write_text(Manifest.model_validate({**manifest.model_dump(), "files": files, **changes}).dump())


def change_tensors(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edit the tensors, now in one shard."""
    tensors = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (out / INDEX).unlink()
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


ROUTER = "model.layers.2.mlp.router.weight"


def swapped_experts(out: Path) -> None:
    change_tensors(out, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].roll(1, 0)}))


def changed_norm(out: Path) -> None:
    change_tensors(out, lambda tensors: tensors["model.norm.weight"].add_(1))


def missing_tensor(out: Path) -> None:
    change_tensors(out, lambda tensors: tensors.pop("model.norm.weight"))


def extra_tensor(out: Path) -> None:
    change_tensors(out, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))


def other_dtype(out: Path) -> None:
    change_tensors(out, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].half()}))


def one_expert_less(out: Path) -> None:
    change_tensors(out, lambda tensors: tensors.update({ROUTER: tensors[ROUTER][:23].clone()}))


def leftover_shard(out: Path) -> None:
    shutil.copy(TRAINED / "model-00001-of-00002.safetensors", out / "left.safetensors")


def other_expert_number(out: Path) -> None:
    change_json(out / "config.json", lambda config: config.update(num_local_experts=32))


def other_top_k(out: Path) -> None:
    change_json(out / "config.json", lambda config: config.update(experts_per_token=2))


def other_config_field(out: Path) -> None:
    change_json(out / "config.json", lambda config: config.update(rope_theta=10000))


def field_left_out(out: Path) -> None:
    change_json(out / "config.json", lambda config: config.pop("swiglu_limit"))


def field_added(out: Path) -> None:
    change_json(out / "config.json", lambda config: config.update(auto_map={}))


def permuted_mapping(out: Path) -> None:
    def swap(mapping: dict[str, Any]) -> None:
        a, b, *_ = mapping["1"]
        mapping["1"][a], mapping["1"][b] = mapping["1"][b], mapping["1"][a]

    change_json(out / "expert_mapping.json", swap)


def mapping_that_is_no_bijection(out: Path) -> None:
    change_json(out / "expert_mapping.json", lambda mapping: mapping["1"].update(dict.fromkeys(mapping["1"], 0)))


def layer_left_out_of_the_mapping(out: Path) -> None:
    change_json(out / "expert_mapping.json", lambda mapping: mapping.pop("1"))


def stale_total_size(out: Path) -> None:
    change_json(out / INDEX, lambda index: index["metadata"].update(total_size=1))


def tensor_left_out_of_the_index(out: Path) -> None:
    change_json(out / INDEX, lambda index: index["weight_map"].pop(ROUTER))


def changed_tokenizer(out: Path) -> None:
    change_json(out / "tokenizer_config.json", lambda config: config.update(x=1))


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (swapped_experts, f"{ROUTER}: found other bytes; expected the 512 of model-"),
        (changed_norm, "model.norm.weight: found other bytes"),
        (missing_tensor, "model.norm.weight: found no such tensor"),
        (extra_tensor, "model.extra.weight: found a tensor; expected none of this name"),
        (other_dtype, rf"{ROUTER}: found F16 \[24, 256\]; expected BF16 \[24, 256\]"),
        (one_expert_less, rf"{ROUTER}: found BF16 \[23, 256\]; expected BF16 \[24, 256\]"),
        (leftover_shard, "left.safetensors: found weights beside the shards"),
        (other_expert_number, "num_local_experts: found 32; expected 24"),
        (other_top_k, "experts_per_token: found 2; expected 4"),
        (other_config_field, "rope_theta: found 10000; expected 150000"),
        (field_left_out, "swiglu_limit: found nothing; expected 7.0"),
        (field_added, "auto_map: found {}; expected no such field"),
        (permuted_mapping, "expert_mapping.json: 1: found .*; expected the ids that the mask keeps, in order"),
        (mapping_that_is_no_bijection, "expert_mapping.json: 1: found .*; expected the new ids from 0 to 23, once each"),
        (layer_left_out_of_the_mapping, "expert_mapping.json: found layers"),
        (stale_total_size, "metadata.total_size: found 1; expected"),
        (tensor_left_out_of_the_index, f"{INDEX}: {ROUTER}: found nothing; expected model-"),
        (changed_tokenizer, "tokenizer_config.json: found SHA-256 .*; expected that of .*which it is a copy of"),
    ],
)
def test_forgeries_with_a_manifest_to_match(out: Path, forge: Callable[[Path], None], message: str) -> None:
    forge(out)
    assert verify_checkpoint(TRAINED, out).problems
    resign(out)
    found = verify_checkpoint(TRAINED, out)
    assert any(re.search(message, str(problem)) for problem in found.problems), found.problems
    with pytest.raises(CheckpointError):
        found.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_hash": "sha256:" + "0" * 64}, "mask_hash"),
        ({"num_experts": 23}, "num_experts"),
        ({"top_k": 3}, "top_k"),
        ({"pad_to": 24}, None),
        ({"pad_to": 20}, "pad_to"),
        ({"recipe": "sha256:" + "0" * 64}, "recipe"),
        ({"max_shard_bytes": 1_000_000}, "bytes of tensors; expected at most 1,000,000"),
        ({"layers": [0]}, "expected none of this name"),
    ],
)
def test_manifests_that_say_something_else(out: Path, changes: dict[str, Any], message: str | None) -> None:
    resign(out, **changes)
    problems = list(map(str, verify_checkpoint(TRAINED, out).problems))
    assert any(message in problem for problem in problems) if message else problems == []


def test_padding_that_tokens_can_reach(models: dict[str, Path], tmp_path: Path) -> None:
    source = models["gpt-oss-mxfp4"]
    rewrite(source, random_mask(source, [8, 4, 9, 4]), tmp_path / "out", pad_to=10)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.1.mlp.router.bias"][9] = -1e30
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    resign(tmp_path / "out")
    (problem,) = verify_checkpoint(source, tmp_path / "out").problems
    assert "model.layers.1.mlp.router.bias: found other bytes; expected those of padding" in str(problem)


def test_folders_that_were_not_rewritten(out: Path, models: dict[str, Path], tmp_path: Path) -> None:
    (problem,) = verify_checkpoint(TRAINED, TRAINED).problems
    assert "manifest.json: found No such file or directory; expected the manifest of a rewritten checkpoint" in str(problem)
    synth_checkpoint("tiny", tmp_path / "other", "mxfp4")
    assert any("base.fingerprint" in str(problem) for problem in verify_checkpoint(tmp_path / "other", out).problems)
    (problem,) = verify_checkpoint(models["qwen3-moe"], out).problems
    assert "model.architecture" in str(problem)
    for left_out in ("tokenizer.json", "README.md", "expert_mapping.json", "config.json"):
        other = tmp_path / left_out.replace(".", "-")
        shutil.copytree(out, other)
        (other / left_out).unlink()
        assert any("no such file" in str(problem) for problem in verify_checkpoint(TRAINED, other).problems)
    (out / "note.txt").write_text("x")
    assert any("only files that manifest.json names" in str(problem) for problem in verify_checkpoint(TRAINED, out).problems)
