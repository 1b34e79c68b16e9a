"""The roofline's bytes are those of sums on paper, for the true shape of gpt-oss-20b and for models of other families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softprune.bench import bandwidth, roofline
from softprune.bench.bandwidth import given
from softprune.bench.hollow import hollow_checkpoint
from softprune.bench.prompts import Workload
from softprune.bench.step_limits import StepLimits
from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.presets import PRESETS, gpt_oss
from softprune.checkpoint.synth import synth_checkpoint
from softprune.errors import CheckpointError, InputError
from softprune.mask_forms import build
from tests.unit.stats_of import MODEL, collected

# gate_up and down of one expert of the 20B shape: blocks of 16 bytes for 32 values, a scale for each block, BF16 biases.
EXPERT_20B = 5760 * 90 * 16 + 5760 * 90 + 5760 * 2 + 2880 * 90 * 16 + 2880 * 90 + 2880 * 2
ATTENTION_20B = 2 * (2880 * 4096 + 4096 + 2 * (2880 * 512 + 512) + 4096 * 2880 + 2880 + 64)
LAYER_20B = ATTENTION_20B + 2 * (2 * 2880 + 32 * 2880 + 32)
REST_20B = 24 * LAYER_20B + 2 * 2880 + 201088 * 2880 * 2


@pytest.fixture(scope="module")
def shape_20b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hollow_checkpoint("gpt-oss-20b", tmp_path_factory.mktemp("hollow") / "20b")


def test_bytes_of_the_20b_shape(shape_20b: Path) -> None:
    sizes = roofline.step_sizes(shape_20b)
    assert EXPERT_20B == 13_236_480
    assert sizes.expert_bytes == (EXPERT_20B,) * 24
    assert sizes.rest_bytes == REST_20B
    assert (sizes.row_bytes, sizes.kv_bytes) == (5760, 2 * 8 * 64 * 2)
    assert sizes.windows == (128, None) * 12
    step = sizes.step(roofline.uniform([32] * 24, 4, 32), 1, 256, 2048)
    assert step["experts"] == pytest.approx(24 * 4 * EXPERT_20B)
    assert step["rest"] == REST_20B + 5760
    # Step t attends to 256 + t tokens, t from 1 to 2047: 1280 in the mean, and never more than 128 in every second layer.
    assert step["kv"] == pytest.approx(2048 * 12 * (1280 + 128))


DISTINCT = [
    (1, 32, 4, 4.0), (2, 32, 4, 7.5), (32, 32, 4, 32 * (1 - 0.875**32)), (32, 16, 4, 16 * (1 - 0.75**32)),
    (8, 24, 2, 24 * (1 - (22 / 24) ** 8)), (64, 4, 4, 4.0),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "kept", "top_k", "expected"), DISTINCT)
def test_distinct_experts(batch: int, kept: int, top_k: int, expected: float) -> None:
    assert roofline.distinct(roofline.uniform([kept] * 3, top_k, 32), batch) == pytest.approx([expected] * 3)


def test_limit_by_hand(shape_20b: Path) -> None:
    sizes = roofline.step_sizes(shape_20b)
    found = roofline.limit(sizes, roofline.uniform([16] * 24, 4, 32), 32, (256, 2048), 4000.0)
    total = REST_20B + 32 * 5760 + 24 * 16 * (1 - 0.75**32) * EXPERT_20B + 32 * 2048 * 12 * 1408
    assert sum(found["bytes"].values()) == pytest.approx(total)
    assert found["tok_s"] == pytest.approx(32 * 4000e9 / total)
    assert found["distinct_experts"] == pytest.approx(15.998, abs=1e-3)


def test_short_contexts_fill_no_window(shape_20b: Path) -> None:
    sizes = roofline.step_sizes(shape_20b, "fp8_e4m3")
    assert sizes.step(roofline.uniform([32] * 24, 4, 32), 3, 8, 4)["kv"] == 3 * 1024 * 24 * 10  # 9, 10 and 11 tokens
    assert sizes.step(roofline.uniform([32] * 24, 4, 32), 3, 8, 1)["kv"] == 3 * 1024 * 24 * 9


def test_experts_in_tensors_of_their_own(tmp_path: Path) -> None:
    for preset, per_expert in (("qwen3-moe-tiny", 3 * 128 * 64 * 2), ("mixtral-tiny", 3 * 128 * 64 * 2)):
        synth_checkpoint(preset, tmp_path / preset, "bf16", seed=0)
        sizes = roofline.step_sizes(tmp_path / preset)
        assert set(sizes.expert_bytes) == {per_expert}
        assert set(sizes.windows) == {None}


def test_a_tied_embedding_is_read_as_the_output_head(shape_20b: Path) -> None:
    config = json.loads((shape_20b / "config.json").read_text())
    before = roofline.step_sizes(shape_20b).rest_bytes
    path = shape_20b / "config.json"
    try:
        path.write_text(json.dumps({**config, "tie_word_embeddings": True}))
        assert roofline.step_sizes(shape_20b).rest_bytes == before + 201088 * 2880 * 2
        path.write_text(json.dumps({**config, "torch_dtype": "int3"}))
        with pytest.raises(CheckpointError, match="torch_dtype: found 'int3'"):
            roofline.step_sizes(shape_20b)
    finally:
        path.write_text(json.dumps(config))


def test_counted_routing() -> None:
    chosen = roofline.counted(np.array([[10, 20, 30, 40]]), 2, "x")
    assert chosen == pytest.approx(np.array([[0.2, 0.4, 0.6, 0.8]]))
    assert roofline.distinct(chosen, 2) == pytest.approx([0.36 + 0.64 + 0.84 + 0.96])
    assert roofline.counted(np.array([[10, 20, 30, 40]]), 2, "x", [[3]]) == pytest.approx(np.array([[1 / 3, 2 / 3, 1, 0]]))
    # No token chooses an expert twice: 90 of 100 with top-2 is always, and the others share one choice.
    assert roofline.counted(np.array([[90, 5, 5, 0]]), 2, "x") == pytest.approx(np.array([[1, 0.5, 0.5, 0]]))
    with pytest.raises(InputError, match="x: router.count: found no selection of an expert that is kept in layer 1"):
        roofline.counted(np.array([[1, 2], [3, 0]]), 1, "x", [[], [0]])


def served(**softprune: Any) -> dict[str, Any]:
    return {"server_flags": {}, "softprune": softprune or None}


def test_limits_of_a_side(tmp_path: Path) -> None:
    """Routing is the probe's, else the statistics', else uniform over what is kept; and what was assumed is said."""
    hollow_checkpoint("tiny", tmp_path / "tiny")
    work = Workload(8, 4)
    limits = StepLimits({"a": tmp_path / "tiny", "b": tmp_path / "tiny"}, gb_s=10.0)
    assert limits.find_bandwidth(None, local=False) == given(10.0)
    plain = limits.of("a", served(), None, None, 1, work)
    assert (plain["routing"], plain["distinct_experts"]) == ("uniform", pytest.approx(4.0))
    mask = build(spec_of(read_config(tmp_path / "tiny")), [list(range(16))] * 4, None, {}, "test")
    unseen = limits.of("b", served(), mask, None, 64, work)  # a server that does not tell what it serves
    assert unseen["distinct_experts"] == pytest.approx(16 * (1 - 0.75**64))
    fewer = limits.of("b", served(num_kept=[16] * 4, top_k=2), None, None, 64, work)
    assert fewer["distinct_experts"] == pytest.approx(16 * (1 - 0.875**64))
    probe = np.zeros((4, 32), np.int64)
    probe[:, :4] = 100
    probed = limits.of("a", served(), None, probe, 64, work)
    assert (probed["routing"], probed["distinct_experts"]) == ("probe", pytest.approx(4.0))
    assert fewer["tok_s"] < probed["tok_s"]
    with pytest.raises(InputError, match="route probe: router.count: found layers and experts"):
        limits.of("a", served(), None, probe[:2], 1, work)


def test_statistics_say_how_experts_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = gpt_oss(num_layers=3, num_experts=12, hidden=128, intermediate=128, heads=4, kv_heads=2, vocab=1024)
    monkeypatch.setitem(PRESETS, "odd", shape)
    hollow_checkpoint("odd", tmp_path / "odd")
    statistics = collected("run", modes=("router",))
    limits = StepLimits({"a": tmp_path / "odd", "b": tmp_path / "odd"}, statistics, gb_s=10.0)
    limits.find_bandwidth(None, local=True)
    found = limits.of("a", served(), None, None, 8, Workload(8, 4))
    counts = statistics["router.count"][0, 1]
    tokens = counts.sum(-1, keepdims=True) / 4
    assert found["routing"] == "statistics"
    assert found["distinct_experts"] == pytest.approx((1 - (1 - counts / tokens) ** 8).sum(-1).mean())
    assert not any("another mask" in text for text in found["assumptions"])
    mask = build(MODEL.spec, [list(range(6))] * 3, None, {}, "test")
    masked = limits.of("b", served(), mask, None, 1000, Workload(8, 4))
    assert 4 < masked["distinct_experts"] <= 6
    assert any("another mask" in text for text in masked["assumptions"])


def test_bandwidth_is_measured_where_the_server_is() -> None:
    found = bandwidth.measured("cpu", local=True)
    assert 0.2 < found.gb_s < 2000
    assert found.how == "PyTorch copy in this machine's memory of 268.4 MB, best of 7, bytes read and written"
    with pytest.raises(InputError, match="another machine"):
        bandwidth.measured("cpu", local=False)
    with pytest.raises(InputError, match="no PyTorch here that can use NVIDIA Fake"):
        bandwidth.measured("NVIDIA Fake", local=True)
