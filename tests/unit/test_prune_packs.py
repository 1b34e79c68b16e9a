"""Collecting for `softprune prune --packs`, up to the engine; tests/evidence/test_prune_packs.py has a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from softprune.bench.tiny.weights import HERE as TINY
from softprune.checkpoint.families import read_config
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.evaluate.packing import block_hashes
from softprune.mask import MaskModel
from softprune.ranking.registry import CRITERIA
from softprune.recipe import collect
from softprune.recipe.collect import collect_from_packs, engine_command, installed_engine, servable
from softprune.recipe.errors import RecipeError
from softprune.recipe.prune import prune
from softprune.stats.collect_packs import load
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics, write
from softprune.stats.header import DataSet, MaskEpoch
from tests.unit.stats_of import header

PACKS = [TINY / "packs" / f"{name}.parquet" for name in ("chat_if", "code")]
WEIGHTS = TINY / "weights"
FINGERPRINT = fingerprint_of_checkpoint(WEIGHTS)
SIZE: dict[str, Any] = {"seq_len": 64, "num_blocks": 2}


def test_modes_hold_what_criteria_read() -> None:
    from softprune.stats.layout import SPECS

    order = ("router", "reap", "eaft")
    for kind in CRITERIA.values():
        if kind.reads == "statistics":
            needed = {"frequency": "router.count", "gate_mass": "router.gate_sum"}
            name = next(name for name, one in CRITERIA.items() if one is kind)
            tensor = needed.get(name, "eaft.grid_gate_norm" if name == "eaft_reap" else "reap.gate_norm_sum")
            assert tensor in kind().tensors()
            assert order.index(kind.mode) == order.index(SPECS[tensor].mode)  # type: ignore[attr-defined]


def test_command_lines() -> None:
    vllm = engine_command("vllm", Path("model"), 15000, 80, ["--softprune-stats", "eaft"])
    assert vllm[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert vllm[-2:] == ["--softprune-stats", "eaft"]
    assert vllm[vllm.index("--max-model-len") + 1] == "80"
    sglang = engine_command("sglang", Path("model"), 15000, 80, ["--softprune-stats", "reap"])
    assert sglang[1:3] == ["-m", "sglang.launch_server"]
    assert str(Path("model").absolute()) in sglang
    with pytest.raises(RecipeError, match="--engine: found tgi; expected vllm or sglang"):
        engine_command("tgi", Path("model"), 15000, 80, [])


def test_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "find_spec", lambda name: name if name == "sglang" else None)
    assert installed_engine() == "sglang"
    monkeypatch.setattr(collect, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="found no engine; expected vllm or sglang installed"):
        installed_engine()


def test_without_a_gpu_mxfp4_is_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect.torch.cuda, "is_available", lambda: False)
    with servable(WEIGHTS) as folder:
        assert "quantization_config" not in read_config(folder)
        assert (folder / "tokenizer.json").is_file()
    assert not folder.exists()
    monkeypatch.setattr(collect.torch.cuda, "is_available", lambda: True)
    with servable(WEIGHTS) as folder:
        assert folder == WEIGHTS


def collected_before(path: Path, changes: dict[str, list[str]] | None = None, fingerprint: str = FINGERPRINT) -> None:
    """A file as the collection of `PACKS` would leave it, but for its numbers."""
    model = MaskModel(architecture="GptOssForCausalLM", num_layers=4, num_experts=32, top_k=4, fingerprint=fingerprint)
    hashes = {tag: [f"sha256:{digest}" for digest in block_hashes(one)] for tag, one in load(PACKS, str(WEIGHTS), **SIZE).items()}
    sets = [DataSet(id=tag, hashes=some) for tag, some in {**hashes, **(changes or {})}.items()]
    head = header(
        "run", ("default", *hashes), ("router", "reap"), model=model, epochs=[MaskEpoch.of("run", 0, None, model)], data_sets=sets
    )
    write(Statistics.zeros(head), path)


def test_what_is_there_is_not_collected_again(tmp_path: Path) -> None:
    told: list[str] = []
    collected_before(tmp_path / "s.safetensors")
    collect_from_packs(WEIGHTS, PACKS, tmp_path / "s.safetensors", "reap", tell=told.append, **SIZE)
    assert told == [f"collect: skipped, {tmp_path / 's.safetensors'} is there and holds these packs"]
    with pytest.raises(StatisticsError, match=r"data_sets: found statistics of chat_if, code \(router, reap\); expected .*\(eaft\)"):
        collect_from_packs(WEIGHTS, PACKS, tmp_path / "s.safetensors", "eaft", **SIZE)
    collected_before(tmp_path / "s.safetensors", {"code": ["sha256:" + "0" * 64]})
    with pytest.raises(StatisticsError, match="or no such file"):
        collect_from_packs(WEIGHTS, PACKS, tmp_path / "s.safetensors", "reap", **SIZE)
    collected_before(tmp_path / "s.safetensors", fingerprint="sha256:" + "e" * 64)
    with pytest.raises(StatisticsError, match=f"model.fingerprint: found sha256:e.*expected {FINGERPRINT}"):
        collect_from_packs(WEIGHTS, PACKS, tmp_path / "s.safetensors", "reap", **SIZE)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--packs: found method weights, which reads no statistics"):
        prune(WEIGHTS, tmp_path / "out", "weights", packs=PACKS)
    with pytest.raises(RecipeError, match="--packs: found --stats as well"):
        prune(WEIGHTS, tmp_path / "out", packs=PACKS, stats="s.safetensors")
