"""Every criterion is its formula, by numbers that were worked out by hand; tags, signs and weights are added up in one way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softprune
from softprune.checkpoint.headers import TensorIndex
from softprune.checkpoint.mxfp4 import dequantize
from softprune.errors import CheckpointError, MaskError
from softprune.mask import MaskModel
from softprune.ranking.api import model_of_checkpoint, rank
from softprune.ranking.errors import RankError
from softprune.ranking.registry import CRITERIA, criterion
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics, write
from softprune.stats.header import Eaft, Grid, MaskEpoch, Plane
from softprune.stats.layout import shapes
from tests.unit.stats_of import ALL, collected, header

MODEL = MaskModel(architecture="GptOssForCausalLM", num_layers=1, num_experts=4, top_k=2, fingerprint="sha256:" + "b" * 64)
GRID = Grid(log10_p=[-2.0, -1.0, 0.0], entropy=[0.0, 0.5, 1.0])


def statistics(tags: tuple[str, ...] = ("default",), attribution: Any = "predictor", **tensors: Any) -> Statistics:
    """Statistics of one layer of four experts; tensors that are not given are zero. Axes of size 1 may be left out in front."""
    head = header(
        "run", tags, ALL, model=MODEL, epochs=[MaskEpoch.of("run", 0, None, MODEL)],
        eaft=Eaft(attribution=attribution, plane=Plane(), grid=GRID),
    )  # fmt: skip
    raw = {name: np.zeros(shape, np.float64 if "sum" in name or "norm" in name else np.int64) for name, shape in shapes(head).items()}
    for name, values in tensors.items():
        full = name.replace("__", ".")
        raw[full] = np.asarray(values).reshape(shapes(head)[full])
    if "router__count" in tensors:
        for tag in range(len(tags)):
            np.fill_diagonal(raw["router.coactivation"][tag, 0], raw["router.count"].sum(1)[tag, 0])
    return Statistics.of(head, raw)


COUNTS = [[[6, 4, 0, 2]], [[1, 1, 2, 0]]]
"""Prefill and decode."""


def test_frequency() -> None:
    found = rank(statistics(router__count=COUNTS), "frequency")
    assert found.values.tolist() == [[7, 5, 2, 2]]
    # Equal ones by id.
    assert found.ranking.tolist() == [[0, 1, 2, 3]]
    assert found.score_key == "count"
    assert rank(statistics(router__count=COUNTS), "frequency", phase="decode").ranking.tolist() == [[2, 0, 1, 3]]


def test_gate_mass() -> None:
    found = rank(statistics(router__count=COUNTS, router__gate_sum=[[[2.0, 3.5, 0.0, 1.0]], [[0.5, 0.25, 1.5, 0.0]]]), "gate_mass")
    assert found.values.tolist() == [[2.5, 3.75, 1.5, 1.0]]
    assert found.columns["gate_mean"].tolist() == [[2.5 / 7, 0.75, 0.75, 0.5]]


REAP = {"reap__count": [10, 2, 5, 0], "reap__norm_sum": [40.0, 20.0, 10.0, 0.0], "reap__gate_norm_sum": [20.0, 9.0, 5.0, 0.0]}


@pytest.mark.parametrize(
    ("method", "parameters", "expected", "key"),
    [
        # An expert that nothing was routed to comes last, and not as NaN.
        ("reap", {}, [2.0, 4.5, 1.0, 0.0], "saliency_mean"),
        ("reap_sum", {}, [20.0, 9.0, 5.0, 0.0], "gate_norm_sum"),
        ("ean", {}, [4.0, 10.0, 2.0, 0.0], "norm_mean"),
        ("ean", {"form": "sum"}, [40.0, 20.0, 10.0, 0.0], "norm_sum"),
    ],
)
def test_reap(method: str, parameters: dict[str, Any], expected: list[float], key: str) -> None:
    found = rank(statistics(**REAP), method, **parameters)
    assert (found.values.tolist(), found.score_key) == ([expected], key)
    assert found.columns["saliency_mean"].tolist() == [[2.0, 4.5, 1.0, 0.0]]
    assert found.by_tag == {}


TAGS = ("default", "math", "chat")
BY_TAG = {
    "reap__count": [[0, 0, 0, 0], [100, 100, 0, 0], [0, 1, 2, 1]],
    "reap__norm_sum": np.zeros((3, 4)),
    "reap__gate_norm_sum": [[0, 0, 0, 0], [300.0, 100.0, 0, 0], [0, 1.0, 6.0, 1.0]],
}


def test_tags_are_added_weighted_or_normalised() -> None:
    stats = statistics(TAGS, **BY_TAG)
    assert rank(stats, "reap_sum").values.tolist() == [[300, 101, 6, 1]]
    assert rank(stats, "reap_sum", tags={"math": 1, "chat": 10}).values.tolist() == [[300, 110, 60, 10]]
    assert rank(stats, "reap_sum", tags={"chat": 2}).values.tolist() == [[0, 2, 12, 2]]
    # Shares: math 3/4, 1/4; chat 1/8, 6/8, 1/8.
    assert rank(stats, "reap_sum", normalise_tags=True).values.tolist() == [[0.75, 0.375, 0.75, 0.125]]
    # A mean is a mean over all tokens, as if a tag's had been given so often.
    assert rank(stats, "reap", tags={"math": 1, "chat": 10}).values.tolist() == [[3.0, 1.0, 3.0, 1.0]]
    means = {"math": np.array([3.0, 1, 0, 0]) / 4, "chat": np.array([0, 1.0, 3, 1]) / 5}
    np.testing.assert_allclose(rank(stats, "reap", normalise_tags=True).values[0], means["math"] + means["chat"])
    found = rank(stats, "reap_sum")
    # A tag that nothing was counted for is none.
    assert {tag: values.tolist() for tag, values in found.by_tag.items()} == {"math": [[300, 100, 0, 0]], "chat": [[0, 1, 6, 1]]}
    assert rank(stats, "reap_sum", tags={"chat": 2}).by_tag == {}


# Per expert, cells [p low/high][H low/high]; two experts a token, so 20 tokens: 4, 4, 8, 4.
CELLS = np.array([[[2, 2], [4, 2]], [[2, 2], [4, 2]], [[4, 0], [8, 0]], [[0, 4], [0, 4]]])
MASS = np.array([[[2.0, 1.0], [8.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]], [[40.0, 0.0], [2.0, 0.0]], [[0.0, 8.0], [0.0, 8.0]]])


def eaft(tags: tuple[str, ...] = ("default",)) -> Statistics:
    grids = {"eaft__grid_count": CELLS, "eaft__grid_gate_norm": MASS}
    return statistics(tags, **{name: [[cells, np.zeros_like(cells)] for _ in tags] for name, cells in grids.items()})


def test_eaft_by_hand_at_the_edges() -> None:
    """Thresholds that fall on edges: p_lo at p = 0.1 (8 of 20 tokens), h_lo at H = 0.5 (12 of 20): every cell lies in one region."""
    found = rank(eaft(), "eaft_reap", p_lo=0.1, h_lo=0.5, h_hi=0.5)
    # good: high p, low H; conflict: low p, low H; uncertain: high H. 8 - 2 * 2 + 0.25 * 3, and so on.
    assert found.values.tolist() == [[8 - 4 + 0.75, 1 - 2 + 0.5, 2 - 80, 4.0]]
    assert found.found["region_counts"] == {"good": 8, "uncertain": 8, "conflict": 4}
    assert found.found["samples"] == 20
    assert found.columns["pos_gate_norm_sum"].tolist() == [[11.0, 3.0, 2.0, 16.0]]
    assert found.columns["neg_gate_norm_sum"].tolist() == [[2.0, 1.0, 40.0, 0.0]]
    assert found.columns["pos_count"].tolist() == [[8, 8, 8, 8]]
    assert found.columns["neg_count"].tolist() == [[2, 2, 4, 0]]
    assert found.found["attribution"] == "predictor"
    mean = rank(eaft(), "eaft_reap", p_lo=0.1, h_lo=0.5, form="mean")
    assert mean.values.tolist() == [[4.75 / 10, -0.5 / 10, -78 / 12, 4 / 8]]
    # Policy: uncertain is low p and high H, and good all the rest.
    policy = rank(eaft(), "eaft_reap", rule="policy", p_lo=0.1, h_lo=0.5, h_hi=0.5)
    assert policy.values.tolist() == [[10 - 4 + 0.25, 2 - 2 + 0.25, 2 - 80, 8 + 2]]


def test_eaft_inside_a_cell() -> None:
    """A quantile of 0.2 is half of the lower 40 % of p, and a third of the lower 60 % of H: so much of each cell is taken."""
    found = rank(eaft(), "eaft_reap", cc_quantile=0.2, w_good=1, w_uncertain=0, w_conflict=-1)
    # good: H low third of [[2], [8]], less the p-low half; conflict: half of a third of 2.
    expected = [8 / 3 + 2 / 6 - 2 / 6, 1 / 3 + 1 / 6 - 1 / 6, 2 / 3 + 40 / 6 - 40 / 6, 0]
    np.testing.assert_allclose(found.values[0], expected, atol=1e-12)
    assert found.found["p_lo"] == pytest.approx(10**-1.5)
    assert found.found["h_lo"] == pytest.approx(0.5 / 3)


def test_signed_sums_are_normalised_by_their_absolute_sum() -> None:
    options: dict[str, Any] = {"p_lo": 0.1, "h_lo": 0.5}
    plain = rank(eaft(("default", "a")), "eaft_reap", **options).values[0]
    own = rank(eaft(), "eaft_reap", **options).values[0]
    np.testing.assert_allclose(plain, 2 * own)
    np.testing.assert_allclose(rank(eaft(), "eaft_reap", normalise_tags=True, **options).values[0], own / np.abs(own).sum())


def test_random_is_seeded() -> None:
    a, b, other = (rank(method="random", model=MODEL, seed=seed).values for seed in (3, 3, 4))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, other)
    # The same on every machine.
    assert rank(method="random", model=MODEL).values[0, 0] == pytest.approx(0.08008121974658733)


@pytest.mark.parametrize("name", ["gpt-oss", "gpt-oss-mxfp4", "qwen3-moe"])
def test_weights(models: dict[str, Path], name: str) -> None:
    folder, index = models[name], TensorIndex(models[name])
    aimer, l1 = (rank(method="weights", checkpoint=folder, statistic=statistic) for statistic in ("aimer", "l1"))
    layer, expert = 2, 5
    if name == "qwen3-moe":
        stem = f"model.layers.{layer}.mlp.experts.{expert}."
        parts = [index.load(stem + part + "_proj.weight") for part in ("gate", "up", "down")]
    elif name == "gpt-oss":
        parts = [index.load(f"model.layers.{layer}.mlp.experts.{part}_proj")[expert] for part in ("gate_up", "down")]
    else:
        stems = [f"model.layers.{layer}.mlp.experts.{part}_proj" for part in ("gate_up", "down")]
        parts = [dequantize(index.load(stem + "_blocks"), index.load(stem + "_scales"))[expert] for stem in stems]
    values = torch.cat([part.flatten() for part in parts]).double()
    assert l1.values[layer, expert] == pytest.approx(values.abs().mean().item(), rel=1e-12)
    assert aimer.values[layer, expert] == pytest.approx((values.square().mean().sqrt() / values.abs().mean()).item(), rel=1e-12)
    assert aimer.model == model_of_checkpoint(folder)


def test_weights_of_both_storage_forms_agree(models: dict[str, Path], tmp_path: Path) -> None:
    from softprune.checkpoint.dequantize import dequantize_checkpoint

    dequantize_checkpoint(models["gpt-oss-mxfp4"], tmp_path / "bf16")
    a, b = (rank(method="weights", checkpoint=folder).values for folder in (models["gpt-oss-mxfp4"], tmp_path / "bf16"))
    np.testing.assert_allclose(a, b, rtol=1e-12)


def test_topical(tmp_path: Path) -> None:
    file = tmp_path / "math.json"
    file.write_text(json.dumps({"think_expert_analytics": {"layer_0": [2, 0]}, "answer_expert_analytics": {"layer_0": [3, 2, 1, 0]}}))
    found = rank(method="topical", model=MODEL, ranking=file)
    assert (found.values.tolist(), found.ranking.tolist()) == ([[3, 0, 4, 0]], [[2, 0, 1, 3]])
    assert rank(method="topical", model=MODEL, ranking=file, section="answer").ranking.tolist() == [[3, 2, 1, 0]]
    file.write_text(json.dumps({"think_expert_analytics": {"layer_0": [2, 7]}}))
    with pytest.raises(MaskError, match=r"layer 0: found \[2, 7\]; expected ids from 0 to 3"):
        rank(method="topical", model=MODEL, ranking=file)
    file.write_text("[[0, 1]]")
    with pytest.raises(MaskError, match="found kept experts"):
        rank(method="topical", model=MODEL, ranking=file)


def test_files_are_added(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(paths):
        write(collected(path.stem, ("default", "t"), seed=seed), path)
    one, two, both = (rank(stats, "reap_sum") for stats in (paths[0], paths[1], paths))
    np.testing.assert_allclose(both.values, one.values + two.values)
    assert [entry["file"] for entry in both.inputs["statistics"]] == ["a.safetensors", "b.safetensors"]
    assert set(both.by_tag) == {"default", "t"}


@pytest.mark.parametrize("method", sorted(CRITERIA))
def test_every_criterion_works_on_what_an_engine_collects(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "ranking.yaml"
    file.write_text(json.dumps({"kind": "reap_scores", "schema_version": 1, "ranking_by_layer": [list(range(12))] * 3}))
    stats = collected("r", ("default", "t"))
    wanted = criterion(method).reads
    given: dict[str, Any] = {
        "statistics": {"stats": stats}, "model": {"model": stats.header.model}, "ranking": {"model": stats.header.model, "ranking": file},
        "checkpoint": {"checkpoint": models["gpt-oss"]},
    }[wanted]  # fmt: skip
    found = rank(method=method, **given)
    assert np.isfinite(found.values).all()
    assert found.values.shape == (found.model.num_layers, found.model.num_experts)


def test_what_is_missing_is_named(models: dict[str, Path]) -> None:
    router = collected("r", modes=("router",))
    with pytest.raises(StatisticsError, match=r"reap\.gate_norm_sum: found none; collected were router"):
        rank(router, "reap")
    for method, match in (
        ("reap", "--stats"),
        ("weights", "--model"),
        ("topical", "--ranking"),
        ("nonsense", "one of frequency, gate"),
    ):
        with pytest.raises(RankError, match=match):
            rank(method=method, model=MODEL)
    with pytest.raises(RankError, match="--model"):
        rank(method="random")
    with pytest.raises(RankError, match=r"method reap: frm: found an unknown parameter; expected none"):
        rank(router, "reap", frm=1)
    with pytest.raises(RankError, match=r"method eaft_reap: cc_quantile: found 1\.5"):
        rank(router, "eaft_reap", cc_quantile=1.5)
    with pytest.raises(RankError, match="no tag 'x'"):
        rank(router, "frequency", tags={"x": 1})
    with pytest.raises(RankError, match="a positive number"):
        rank(router, "frequency", tags={"default": -1})
    with pytest.raises(RankError, match="reads no statistics"):
        rank(method="random", model=MODEL, tags={"default": 1})
    with pytest.raises(RankError, match=r"model\.num_layers: found 3; expected 4"):
        rank(router, "frequency", checkpoint=models["gpt-oss"])
    with pytest.raises(RankError, match="no sampled tokens.*expected some, to rank by, or kind=teacher_forced"):
        rank(eaft(), "eaft_reap", kind="sampled")
    with pytest.raises(CheckpointError):
        rank(method="weights", checkpoint="nowhere")


def test_functions_of_the_package() -> None:
    assert softprune.rank is rank
    with pytest.raises(AttributeError, match="nonsense"):
        _ = softprune.nonsense


@pytest.mark.parametrize(("method", "parameters"), [("frequency", {"phase": "decode"}), ("gate_mass", {}), ("reap", {})])
def test_nothing_that_was_counted_ranks_nothing(method: str, parameters: dict[str, Any]) -> None:
    """Ids in ascending order would look like a ranking."""
    found = statistics(router__count=[[[6, 4, 0, 2]], [[0, 0, 0, 0]]])
    with pytest.raises(RankError, match=f"scores: found nothing that {method} ranks by, in MoE layer 0; expected tokens that were counted"):
        rank(found, method, **parameters)


def test_statistics_for_a_method_that_reads_none_are_named() -> None:
    with pytest.raises(RankError, match="--stats: found statistics for weights, which reads none; expected --model"):
        rank(statistics(router__count=COUNTS), "weights")
