"""A rewritten checkpoint is the plainly sliced one, in every family and storage form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import softprune
from softprune.bench.hollow import hollow_checkpoint
from softprune.bench.tiny.weights import TRAINED
from softprune.checkpoint.families import family_of, read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.checkpoint.headers import INDEX, TensorIndex
from softprune.checkpoint.manifest import read_manifest
from softprune.checkpoint.plan import plan_rewrite
from softprune.checkpoint.rewrite import rewrite
from softprune.checkpoint.synth import synth_checkpoint
from softprune.checkpoint.verify import verify_checkpoint
from softprune.evaluate.reference import load_reference
from softprune.mask import ExpertMask
from softprune.mask_forms import build, convert
from tests.conftest import random_mask, saved
from tests.slicing import slice_checkpoint

NAMES = ["trained", "gpt-oss", "gpt-oss-mxfp4", "qwen3-moe", "mixtral"]
KEEP = {"trained": 24, "gpt-oss": 19, "gpt-oss-mxfp4": 24, "qwen3-moe": 9, "mixtral": 5}


@pytest.fixture(scope="module")
def sources(models: dict[str, Path]) -> dict[str, Path]:
    return {**models, "trained": TRAINED}


def first_mask(model: Path, number: int) -> ExpertMask:
    spec = spec_of(read_config(model))
    return build(spec, [range(number)] * spec.num_layers, None, {}, "first")


def same_tensors(a: Path, b: Path) -> None:
    one, two = TensorIndex(a), TensorIndex(b)
    assert set(one) == set(two)
    for name in one:
        assert one.tensors[name].dtype == two.tensors[name].dtype, name
        assert one.load(name).shape == two.load(name).shape, name
        assert torch.equal(one.load(name).view(torch.uint8), two.load(name).view(torch.uint8)), name


@pytest.mark.parametrize("name", NAMES)
def test_rewritten_equals_sliced(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, mask = sources[name], random_mask(sources[name], KEEP[name], seed=3)
    slice_checkpoint(source, mask, tmp_path / "sliced")
    softprune.rewrite(source, mask, tmp_path / "out", max_shard_bytes=1_500_000)
    same_tensors(tmp_path / "out", tmp_path / "sliced")
    config, before = read_config(tmp_path / "out"), read_config(source)
    family = family_of(before)
    assert config == {**before, family.num_experts_key: KEEP[name]}
    assert len(TensorIndex(tmp_path / "out").shards) > 1
    found = verify_checkpoint(source, tmp_path / "out")
    assert found.problems == []
    assert found.num_experts == KEEP[name] * spec_of(before).num_layers
    assert found.num_bytes == TensorIndex(tmp_path / "out").num_bytes


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_changes_nothing(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = sources[name]
    spec = spec_of(read_config(source))
    rewrite(source, build(spec, [None] * spec.num_layers, None, {}, "all"), tmp_path / "out")
    same_tensors(source, tmp_path / "out")
    assert read_config(tmp_path / "out") == read_config(source)
    assert fingerprint_of_checkpoint(tmp_path / "out") == fingerprint_of_checkpoint(source)


def test_shards_hold_what_the_index_says_and_no_more_than_allowed(sources: dict[str, Path], tmp_path: Path) -> None:
    rewrite(TRAINED, random_mask(TRAINED, 16), tmp_path / "out", max_shard_bytes=2_000_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    held = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert index["weight_map"] == {name: shard for shard, tensors in held.items() for name in tensors}
    sizes = {shard: [tensor.nbytes for tensor in tensors.values()] for shard, tensors in held.items()}
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert all(sum(each) <= 2_000_000 or len(each) == 1 for each in sizes.values())
    assert not any(".experts." in name and tensor.shape[0] != 16 for tensors in held.values() for name, tensor in tensors.items())


def test_top_k_goes_into_the_config(tmp_path: Path) -> None:
    rewrite(TRAINED, random_mask(TRAINED, 8, top_k=2), tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert (config["num_experts_per_tok"], config["experts_per_token"], config["num_local_experts"]) == (2, 2, 8)
    assert verify_checkpoint(TRAINED, tmp_path / "out").problems == []


def test_mapping_is_read_back_as_the_mask(tmp_path: Path) -> None:
    mask = random_mask(TRAINED, 20, seed=8)
    rewrite(TRAINED, saved(mask, tmp_path / "mask.json"), tmp_path / "out")
    assert convert(tmp_path / "out" / "expert_mapping.json", spec_of(read_config(TRAINED)), None).keep == mask.keep


def test_same_rewrite_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    for name, workers in (("a/out", 1), ("b/out", 3)):
        rewrite(TRAINED, random_mask(TRAINED, 20), tmp_path / name, max_shard_bytes=1_000_000, workers=workers)
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir()} for name in "ab")
    assert a == b
    assert len(a) > 10


def test_other_files_go_along_and_other_weights_do_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(TRAINED, source)
    for name in ("original/model.safetensors", "original/config.json", "metal/model.bin", ".git/HEAD", "docs/a/note.txt", "LICENSE",
                 "consolidated.safetensors", "model-q4.gguf", "pytorch_model.bin.index.json", "chat_template.jinja"):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\nbase\n")
    rewrite(source, random_mask(source, 20), tmp_path / "out")
    out = tmp_path / "out"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "config.json", "expert_mapping.json", "manifest.json", "model.safetensors", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "docs/a/note.txt", "LICENSE", "chat_template.jinja",
    }  # fmt: skip
    manifest = read_manifest(out)
    assert manifest.left_out == [
        ".git/",
        "consolidated.safetensors",
        "metal/",
        "model-q4.gguf",
        "original/",
        "pytorch_model.bin.index.json",
    ]
    assert set(manifest.files) == files - {"manifest.json"}
    assert verify_checkpoint(source, out).problems == []
    assert ModelCard.load(out / "README.md").data.license == "apache-2.0"


def test_card_and_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("kind: reap_recipe\n")
    rewrite(TRAINED, random_mask(TRAINED, 24, seed=5), tmp_path / "small", recipe=tmp_path / "r.yaml", base_model="someone/base-model")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.base_model == "someone/base-model"
    assert {"softprune", "moe", "expert-pruning", "random"} <= set(card.data.tags)
    for text in (
        "| experts kept | 96 of 128 (75.0%); 24 of 32 in a layer |",
        "method: random",
        "seed: 5",
        "vllm serve small",
        "recipe.yaml",
    ):
        assert text in card.text
    assert (tmp_path / "small" / "recipe.yaml").read_text() == "kind: reap_recipe\n"
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "small").iterdir() if path.suffix in (".md", ".json"))


def test_hub_cache_names_the_base_model(tmp_path: Path) -> None:
    source = tmp_path / "models--openai--gpt-oss-20b" / "snapshots" / "abc"
    shutil.copytree(TRAINED, source)
    rewrite(source, random_mask(source, 24), tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "openai/gpt-oss-20b"


def test_a_rewritten_checkpoint_can_be_rewritten_again(tmp_path: Path) -> None:
    rewrite(TRAINED, random_mask(TRAINED, 24), tmp_path / "a")
    rewrite(tmp_path / "a", random_mask(tmp_path / "a", 16, seed=1), tmp_path / "b")
    assert verify_checkpoint(tmp_path / "a", tmp_path / "b").problems == []
    assert read_manifest(tmp_path / "b").base.manifest is not None
    assert verify_checkpoint(TRAINED, tmp_path / "b").problems


def test_a_part_of_a_model(tmp_path: Path) -> None:
    synth_checkpoint("tiny", tmp_path / "part", "mxfp4", seed=1, layers=[0, 2])
    mask = first_mask(tmp_path / "part", 24)
    plan = rewrite(tmp_path / "part", mask, tmp_path / "out", layers=[2, 0])
    assert {name.split(".")[2] for name in TensorIndex(tmp_path / "out")} == {"0", "2"}
    assert plan.fingerprint is None
    assert "layers are missing" in plan.warnings[0]
    found = verify_checkpoint(tmp_path / "part", tmp_path / "out")
    assert (found.problems, found.num_experts) == ([], 48)
    assert json.loads((tmp_path / "out" / "expert_mapping.json").read_text()).keys() == {"0", "2"}


def test_a_dry_run_of_a_few_layers(models: dict[str, Path], tmp_path: Path) -> None:
    rewrite(models["qwen3-moe"], random_mask(models["qwen3-moe"], 8), tmp_path / "out", layers=[1])
    assert {name.split(".")[2] for name in TensorIndex(tmp_path / "out")} == {"1"}
    assert verify_checkpoint(models["qwen3-moe"], tmp_path / "out").problems == []
    assert "dry run of decoder layers 1" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["gpt-oss", "gpt-oss-mxfp4"])
def test_padding(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Layers that keep different numbers, filled up: the same logits as with the pruned routers' biases at -inf."""
    mask = random_mask(sources[name], [20, 4, 32, 11], seed=5)
    plan = rewrite(sources[name], mask, tmp_path / "out", pad_to=32, max_shard_bytes=3_000_000)
    assert plan.num_experts == 32
    found = verify_checkpoint(sources[name], tmp_path / "out")
    assert (found.problems, found.num_experts, found.num_padding) == ([], 67, 4 * 32 - 67)
    bias = TensorIndex(tmp_path / "out").load("model.layers.1.mlp.router.bias")
    assert bias[:4].isfinite().all()
    assert (bias[4:] == float("-inf")).all()
    ids = torch.randint(0, 480, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        padded = load_reference(tmp_path / "out")(ids).logits
        model = load_reference(sources[name])
        unmasked = model(ids).logits
        for layer in range(4):
            model.model.layers[layer].mlp.router.bias[mask.pruned(layer)] = float("-inf")
        masked = model(ids).logits
    assert padded.isfinite().all()
    torch.testing.assert_close(padded, masked, rtol=1e-5, atol=1e-5)
    assert (unmasked - masked).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3-moe", "mixtral"])
def test_transformers_loads_every_tensor(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    rewrite(sources[name], random_mask(sources[name], KEEP[name]), tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_studys_byte_counts(tmp_path: Path) -> None:
    """Routers and experts of the 20B shape, as the study's shards have them, and the rest: 13,242,242 bytes an expert."""
    source = hollow_checkpoint("gpt-oss-20b", tmp_path / "20b")
    expected = {32: 10_170_041_856, 24: 7_627_531_392, 20: 6_356_276_160, 16: 5_085_020_928}
    plans = {keep: plan_rewrite(source, first_mask(source, keep)) for keep in expected}
    assert {keep: plan.pruned_bytes() for keep, plan in plans.items()} == expected
    assert plans[32].payload_bytes == plans[32].bytes_read == plans[32].index.num_bytes
    assert plans[24].bytes_written == plans[24].bytes_read == plans[24].index.num_bytes - 8 * 24 * 13_242_242
    # The study's one shard of everything else holds 3,591,253,096 bytes, a header of a few kilobytes among them.
    assert 0 < 3_591_253_096 - (plans[24].payload_bytes - plans[24].pruned_bytes()) < 50_000
    assert all(sum(tensor.num_bytes for tensor in shard) <= 5_000_000_000 for shard in plans[24].shards)


def test_the_120b_shape_is_planned(tmp_path: Path) -> None:
    source = hollow_checkpoint("gpt-oss-120b", tmp_path / "120b", 4_200_000_000)
    plan = plan_rewrite(source, first_mask(source, 64))
    assert plan.pruned_bytes() == 36 * 847_503_488
    assert round(plan.index.num_bytes / 2**30, 2) == 60.77
    touched = {len(plan.shards_touched(layer)) for layer in plan.moe_layers}
    assert touched <= {1, 2, 3}
    one = plan_rewrite(source, first_mask(source, 64), layers=[18])
    assert one.pruned_bytes() == 847_503_488
