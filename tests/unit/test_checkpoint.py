"""Checkpoint tools: families, headers, fingerprint, random checkpoints, dequantisation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.checkpoint.families import family_of, read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.checkpoint.harmony import SPECIAL_TOKENS
from softprune.checkpoint.headers import TensorIndex
from softprune.checkpoint.mxfp4 import dequantize
from softprune.checkpoint.synth import synth_checkpoint
from softprune.errors import CheckpointError

MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2}


def test_families(models: dict[str, Path]) -> None:
    names = {name: family_of(read_config(path)).name for name, path in models.items()}
    assert names == {"gpt-oss": "gpt-oss-bf16", "gpt-oss-mxfp4": "gpt-oss-mxfp4", "qwen3-moe": "qwen3-moe", "mixtral": "mixtral"}
    assert spec_of(MIXTRAL).num_experts == 8


def test_the_family_table_names_every_router_and_expert_tensor(models: dict[str, Path]) -> None:
    for path in models.values():
        family, spec, index = family_of(read_config(path)), spec_of(read_config(path)), TensorIndex(path)
        named = {
            name.format(layer=layer, expert=expert)
            for layer in spec.moe_layers
            for name in (*family.expert_tensors, family.router_weight, family.router_bias or family.router_weight)
            for expert in range(spec.num_experts)
        }
        assert named == {name for name in index if ".experts." in name or ".router." in name or ".gate." in name}
        if not family.expert_index:
            assert {index.tensors[name].shape[0] for name in named} == {spec.num_experts}


def test_layers_without_experts_are_skipped() -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 6, "num_experts": 4, "num_experts_per_tok": 2,
        "mlp_only_layers": [1], "decoder_sparse_step": 2,
    }  # fmt: skip
    assert spec_of(config).moe_layers == (3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*expected one of GptOssForCausalLM"),
        ({"num_local_experts": None}, "num_local_experts: found None"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok: found True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: found 0"),
    ],
)
def test_configs_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec_of({**MIXTRAL, **change})


def test_storage_that_is_not_known() -> None:
    with pytest.raises(CheckpointError, match="quant_method: found 'awq'; expected a checkpoint stored as bf16"):
        family_of({**MIXTRAL, "quantization_config": {"quant_method": "awq"}})


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json: found no such file"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="expected a safetensors checkpoint"):
        TensorIndex(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(CheckpointError, match="header: found unreadable"):
        TensorIndex(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="a shard that the index names"):
        TensorIndex(tmp_path)


def test_fingerprint_ignores_how_experts_are_stored(models: dict[str, Path]) -> None:
    assert fingerprint_of_checkpoint(models["gpt-oss"]) == fingerprint_of_checkpoint(models["gpt-oss-mxfp4"])


def test_fingerprint_sees_one_changed_router_bias(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(models["gpt-oss"] / "model.safetensors")
    tensors["model.layers.2.mlp.router.bias"][7] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((models["gpt-oss"] / "config.json").read_text())
    assert fingerprint_of_checkpoint(tmp_path) != fingerprint_of_checkpoint(models["gpt-oss"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss of random weights, seed 1, in BF16."""
    folder = tmp_path_factory.mktemp("synth") / "gpt-oss"
    synth_checkpoint("tiny", folder, "bf16", seed=1)
    return folder


def test_same_seed_same_bytes(made: Path, tmp_path: Path) -> None:
    synth_checkpoint("tiny", tmp_path / "again", "bf16", seed=1)
    synth_checkpoint("tiny", tmp_path / "other", "bf16", seed=2)
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (made / file).read_bytes()
    assert (tmp_path / "other" / file).read_bytes() != (made / file).read_bytes()


def test_shards_hold_the_same_tensors(made: Path, tmp_path: Path) -> None:
    synth_checkpoint("tiny", tmp_path / "sharded", "bf16", seed=1, max_shard_bytes=3_000_000)
    whole, sharded = TensorIndex(made), TensorIndex(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert all(torch.equal(whole.load(name), sharded.load(name)) for name in whole)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole.num_bytes == sharded.num_bytes


def test_a_part_holds_the_bytes_of_the_whole(made: Path, tmp_path: Path) -> None:
    synth_checkpoint("tiny", tmp_path / "part", "bf16", seed=1, layers=[2, 0])
    whole, part = TensorIndex(made), TensorIndex(tmp_path / "part")
    assert {name.split(".")[2] for name in part} == {"0", "2"}
    assert all(torch.equal(whole.load(name), part.load(name)) for name in part)
    assert read_config(tmp_path / "part")["num_hidden_layers"] == 4


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("huge", {}, "found 'huge'"),
        ("tiny", {"layers": [4]}, "layers: found 4"),
        ("qwen3-moe-tiny", {"storage": "mxfp4"}, "stored as bf16"),
    ],
)
def test_what_cannot_be_made(tmp_path: Path, preset: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        synth_checkpoint(preset, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(models: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        synth_checkpoint("tiny", models["gpt-oss"])


def test_transformers_reads_config_and_tokenizer(models: dict[str, Path]) -> None:
    for path in models.values():
        AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert max(tokenizer.get_vocab().values()) < read_config(path)["vocab_size"]
        text = "Grüße! 12 * 7 = 84 <|end|><|start|>assistant"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert all(len(tokenizer.encode(token)) == 1 for token in SPECIAL_TOKENS)
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
        assert rendered == "<|start|>user<|message|>Hi<|end|><|start|>assistant"


def test_a_20b_layer_needs_little_memory(tmp_path: Path) -> None:
    """One layer of the 20B shape, 424 MB, is written in far less memory than it has bytes in all."""
    code = (
        "from softprune.bench.process_memory import status_mib; from softprune.checkpoint.synth import synth_checkpoint;"
        "before = status_mib('VmHWM');"
        f"synth_checkpoint('gpt-oss-20b', {str(tmp_path / 'part')!r}, 'mxfp4', layers=[7]);"
        "print(int(status_mib('VmHWM') - before))"
    )
    grown_mib = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    size = TensorIndex(tmp_path / "part").num_bytes
    assert size > 420_000_000
    assert grown_mib < 256


def test_dequantisation_is_that_of_transformers() -> None:
    """Every code and every scale that stays within BF16, bit for bit."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 128, 4, 16), dtype=torch.uint8, generator=generator)
    blocks[0, 0, 0] = torch.arange(0, 256, 16, dtype=torch.uint8)
    scales = torch.arange(3 * 128 * 4, dtype=torch.int64).remainder(253).to(torch.uint8).reshape(3, 128, 4)
    reference = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    mine = dequantize(blocks, scales)
    assert mine.dtype == torch.bfloat16
    assert mine.shape == reference.shape == (3, 128, 128)
    assert torch.equal(mine.view(torch.int16), reference.contiguous().view(torch.int16))


def test_a_dequantised_checkpoint_is_the_bf16_one(made: Path, tmp_path: Path) -> None:
    synth_checkpoint("tiny", tmp_path / "mxfp4", "mxfp4", seed=1)
    dequantize_checkpoint(tmp_path / "mxfp4", tmp_path / "out")
    found, expected = TensorIndex(tmp_path / "out"), TensorIndex(made)
    assert set(found) == set(expected)
    assert all(torch.equal(found.load(name).view(torch.uint8), expected.load(name).view(torch.uint8)) for name in expected)
    assert read_config(tmp_path / "out") == read_config(made)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(CheckpointError, match="expected an MXFP4 checkpoint"):
        dequantize_checkpoint(made, tmp_path / "twice")
