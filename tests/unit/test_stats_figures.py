"""Figures that can be worked out by hand, and what they say of nothing at all."""

from __future__ import annotations

import math

import numpy as np
import pytest

from softprune.stats import figures
from softprune.stats.file import Statistics
from softprune.stats.merge import merge
from softprune.stats.summary import compare, complete, describe, selections, selections_of, tag_divergence
from tests.unit.stats_of import MODEL, collected, header

COUNTS = np.array([[6, 3, 1, 0], [5, 5, 5, 5], [0, 0, 0, 0]])


def test_shares_and_effective_number() -> None:
    assert figures.shares(COUNTS)[0].tolist() == [0.6, 0.3, 0.1, 0]
    assert figures.effective_number(COUNTS).tolist() == pytest.approx([100 / 46, 4, 0])
    assert np.isnan(figures.shares(COUNTS)[2]).all()


def test_concentration() -> None:
    assert figures.concentration(COUNTS)[0].tolist() == pytest.approx([0.6, 0.9, 1, 1])
    assert figures.concentration(COUNTS[:1, ::-1]).tolist() == figures.concentration(COUNTS[:1]).tolist()
    assert figures.top_share(COUNTS, 2)[:2].tolist() == pytest.approx([0.9, 0.5])
    assert figures.top_share(COUNTS, 99)[:2].tolist() == pytest.approx([1, 1])


def test_ratio_of_nothing_is_nan() -> None:
    values = figures.ratio(np.array([3.0, 0.0]), np.array([4, 0]))
    assert values[0] == 0.75
    assert math.isnan(values[1])


def test_ranking_and_overlap() -> None:
    a, b = np.array([9, 1, 5, 5, 0]), np.array([9, 8, 0, 1, 7])
    assert figures.ranking(a).tolist() == [0, 2, 3, 1, 4]
    assert figures.ranking(np.arange(128) % 2).tolist() == [*range(1, 128, 2), *range(0, 128, 2)]
    assert float(figures.overlap(a, b, 3)) == pytest.approx(1 / 3)
    assert float(figures.overlap(a, a, 3)) == 1


def test_rank_correlation() -> None:
    a = np.array([10, 20, 30, 40, 50])
    assert float(figures.rank_correlation(a, a**2)) == pytest.approx(1)
    assert float(figures.rank_correlation(a, -a)) == pytest.approx(-1)
    # 1 - 6 * sum d^2 / (n (n^2 - 1)) with d = 1, -1, 0, 0, 0.
    assert float(figures.rank_correlation(a, np.array([2, 1, 3, 4, 5]))) == pytest.approx(0.9)
    # Ties share ranks: (1, 2.5, 2.5, 4) against (1, 2, 3, 4) is Pearson of these, 4.5 / sqrt(4.5 * 5).
    assert float(figures.rank_correlation(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4]))) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(float(figures.rank_correlation(a, np.ones(5))))


def test_js_divergence() -> None:
    a, b = np.array([[4, 0], [2, 2], [1, 1], [0, 0]]), np.array([[0, 7], [5, 5], [1, 3], [1, 1]])
    found = figures.js_divergence(a, b)
    by_hand = (
        0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625) + 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    ) / 2
    assert found[:3].tolist() == pytest.approx([math.log(2), 0, by_hand])
    assert math.isnan(found[3])


def test_perplexity_and_quantile() -> None:
    assert float(figures.perplexity(np.array(20.0), np.array(10))) == pytest.approx(math.e**2)
    assert float(figures.perplexity(np.array(1e9), np.array(10))) == pytest.approx(math.e**30)
    edges = np.linspace(0, 1, 5)
    assert figures.quantile(np.array([1, 0, 2, 1]), edges, 0.25) == 0.25
    assert figures.quantile(np.array([1, 0, 2, 1]), edges, 0.26) == 0.75
    assert figures.quantile(np.array([1, 0, 2, 1]), edges, 1.0) == 1.0
    assert figures.quantile(np.zeros(4), edges, 0.5) == 0.0


def test_selections_are_tokens_times_top_k() -> None:
    statistics = collected("run-1", ("default", "code"))
    assert complete(statistics) is True
    assert complete(merge([statistics, collected("run-2", seed=2)])) is True
    assert complete(merge([statistics, collected("run-2", modes=("reap",), seed=2)])) is None
    tokens = {**statistics.header.tokens, "code": statistics.header.tokens["code"].model_copy(update={"decode": 10**6})}
    assert complete(Statistics(statistics.header.model_copy(update={"tokens": tokens}), statistics.tensors)) is False


def test_a_description_adds_up() -> None:
    statistics = collected("run-1", ("default", "code"), num_tokens=200)
    data = describe(statistics)
    count = selections(statistics)
    assert count.shape == (2, MODEL.num_layers, MODEL.num_experts)
    assert np.array_equal(count.sum(0), selections_of(statistics, None))
    for layer, row in enumerate(data["layers"]):
        whole = count.sum(0)[layer]
        assert row["max_share"] == whole.max() / whole.sum()
        assert row["max_expert"] == whole.argmax()
        assert row["top8_share"] == pytest.approx(np.sort(whole)[-8:].sum() / whole.sum())
        assert row["reap_mean"] == statistics["reap.gate_norm_sum"][:, layer].sum() / statistics["reap.count"][:, layer].sum()
        assert 0.25 <= row["top1_gate_p50"] <= 1
    tag = describe(statistics, "code")
    assert tag["layers"][0]["max_share"] == count[1, 0].max() / count[1, 0].sum()
    assert [(row["tag"], row["kind"]) for row in tag["eaft"]] == [("code", "teacher_forced"), ("code", "sampled")]
    for row in data["eaft"]:
        tokens = statistics.header.tokens[row["tag"]]
        assert row["tokens"] == (tokens.prefill if row["kind"] == "teacher_forced" else tokens.decode)
        i, k = statistics.tag_index(row["tag"]), int(row["kind"] == "sampled")
        assert row["perplexity"] == pytest.approx(math.exp(statistics["eaft.nll_sum"][i, k] / row["tokens"]))
        assert row["mean_entropy"] == pytest.approx(9 * row["mean_entropy_top20"], rel=1e-4)


def test_tags_that_want_different_experts_diverge() -> None:
    matrix = tag_divergence(collected("run-1", ("default", "code", "math"), num_tokens=300))
    assert np.diag(matrix).tolist() == [0, 0, 0]
    assert matrix[np.triu_indices(3, 1)].min() > 0.02
    assert np.array_equal(matrix, matrix.T)


@pytest.mark.parametrize("modes", [("router",), ("reap",), ("eaft",)])
def test_any_mode_alone_is_described(modes: tuple[str, ...]) -> None:
    statistics = collected("run-1", ("default", "code"), modes)  # type: ignore[arg-type]
    data = describe(statistics)
    assert data["counted_by"].startswith(modes[0])
    assert all(row["max_share"] > 1 / MODEL.num_experts for row in data["layers"])
    # Nothing at all is no error either.
    empty = describe(Statistics.zeros(header("run-1", ["default", "code"], modes)))  # type: ignore[arg-type]
    assert [row["max_share"] for row in empty["layers"]] == [None] * 3
    assert empty["eaft"] == []


def test_files_are_compared_layer_by_layer() -> None:
    a, b = collected("run-1", num_tokens=300), collected("run-2", ("default", "code"), seed=5, num_tokens=300)
    same = compare(a, a)
    assert [(row["js_divergence"], row["overlap"]) for row in same["layers"]] == [(0, {"8": 1})] * 3
    assert same["layers"][0]["rank_correlation"] == pytest.approx(1)
    near, far = compare(a, b, "default"), compare(a, b)
    for one, other in zip(near["layers"], far["layers"], strict=True):
        assert 0 < one["js_divergence"] < other["js_divergence"] < math.log(2)
        assert one["rank_correlation"] > other["rank_correlation"]
    nothing = compare(a, Statistics.zeros(header("run-3", ["default"])))
    assert nothing["layers"][0] == {"layer": 0, "js_divergence": None, "rank_correlation": None, "overlap": {}}
