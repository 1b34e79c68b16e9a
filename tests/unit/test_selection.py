"""Budgets, core experts, unions and guarantees keep what the rules say, and the mask tells why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import softprune
from softprune.errors import MaskError
from softprune.mask import ExpertMask, MaskModel
from softprune.ranking.scores import Scores
from softprune.selection.budget import Budget, spread
from softprune.selection.select import Protect, Union, coverage_set, select, super_experts
from softprune.stats.figures import effective_number

GPT_OSS_20B = MaskModel(architecture="GptOssForCausalLM", num_layers=24, num_experts=32, top_k=4, fingerprint="sha256:" + "d" * 64)


def scores(values: Any, tags: dict[str, Any] | None = None, top_k: int = 1, architecture: str = "GptOssForCausalLM", **more: Any) -> Scores:
    table = np.asarray(values, np.float64)
    model = MaskModel(architecture=architecture, num_layers=len(table), num_experts=table.shape[1], top_k=top_k)
    columns = {name: np.asarray(column, np.float64) for name, column in more.pop("columns", {}).items()}
    by_tag = {tag: np.asarray(rows, np.float64) for tag, rows in (tags or {}).items()}
    return Scores("reap_sum", model, table, "gate_norm_sum", "…", columns=columns, by_tag=by_tag, **more)


RISING = scores([range(8), range(8, 0, -1)])


def test_the_best_stay_and_the_mask_tells_why() -> None:
    mask = select(RISING, keep=3)
    assert softprune.select is select
    assert isinstance(mask, ExpertMask)
    assert mask.keep == [[5, 6, 7], [0, 1, 2]]
    assert mask.model == RISING.model
    assert mask.provenance["layers"] == [
        {"rank": [7, 6, 5], "lowest_kept": [5, 5.0], "best_pruned": [4, 4.0]},
        {"rank": [0, 1, 2], "lowest_kept": [2, 6.0], "best_pruned": [3, 5.0]},
    ]
    assert mask.provenance["selection"]["budget"]["keep"] == 3
    assert select(RISING, keep=8).provenance["layers"][0]["best_pruned"] is None


def test_equal_scores_keep_the_lower_id() -> None:
    assert select(scores([[1, 1, 1, 1]]), keep=2).keep == [[0, 1]]


@pytest.mark.parametrize(
    ("budget", "experts", "expected"),
    [
        # The study's: 0.60 of 32 gives 20 with multiple 4, whatever the rounding; and its older name keep19.
        ({"keep_frac": 0.60, "multiple": 4}, 32, 20),
        ({"keep_frac": 0.60, "multiple": 4, "rounding": "floor"}, 32, 20),
        ({"keep_frac": 0.60, "multiple": 4, "rounding": "round"}, 32, 20),
        ({"keep_frac": 0.60}, 32, 20),
        ({"keep_frac": 0.60, "rounding": "floor"}, 32, 19),
        ({"keep_frac": 0.60, "rounding": "round"}, 32, 19),
        ({"keep_frac": 0.75, "multiple": 4}, 32, 24),
        ({"keep_frac": 0.5}, 128, 64),
        # Of floats, 0.7 * 10 is a hair above 7 and 0.29 * 100 a hair below 29.
        ({"keep_frac": 0.7}, 10, 7),
        ({"keep_frac": 0.29, "rounding": "floor"}, 100, 29),
        ({"keep_frac": "0.29"}, 100, 29),
        ({"keep_frac": 1}, 32, 32),
        # Half to even, as Python rounds.
        ({"keep_frac": 0.25, "rounding": "round"}, 10, 2),
        ({"keep_frac": 0.9, "multiple": 4}, 30, 28),
        ({"compression_ratio": 0.5}, 32, 16),
        # REAP removes int(E * ratio).
        ({"compression_ratio": 0.3}, 32, 23),
        ({"compression_ratio": 0.3, "multiple": 4}, 32, 24),
        ({"compression_ratio": "0.7"}, 10, 3),
        ({"compression_ratio": 0}, 32, 32),
        ({"keep": 20, "multiple": 4}, 32, 20),
    ],
)
def test_numbers_that_stay(budget: dict[str, Any], experts: int, expected: int) -> None:
    assert Budget(**budget).uniform(experts) == expected


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        ({}, "found nothing; expected exactly one of keep, keep_frac and compression_ratio"),
        ({"keep": 3, "keep_frac": 0.5}, "found keep and keep_frac"),
        ({"keep": 0}, "keep: found 0; expected 1 to 32 experts kept"),
        ({"keep": 33}, "keep: found 33"),
        ({"keep": 22, "multiple": 4}, "keep: found 22; expected a multiple of 4"),
        ({"keep_frac": 1.5}, r"keep_frac: found 1\.5; expected a share between 0 and 1"),
        ({"keep_frac": "half"}, "keep_frac: found half"),
        ({"keep_frac": float("nan")}, "keep_frac: found nan"),
        ({"compression_ratio": 1}, "compression_ratio: found 1"),
        ({"keep": 3, "multiple": 0}, "multiple: found 0"),
    ],
)
def test_bad_numbers(budget: dict[str, Any], match: str) -> None:
    with pytest.raises(MaskError, match=match):
        Budget(**budget).uniform(32)


def test_what_a_backend_needs() -> None:
    wide = scores(np.tile(np.arange(32.0), (2, 1)))
    assert select(wide, keep_frac=0.6, rounding="floor").num_kept == [19, 19]
    assert select(wide, keep_frac=0.6, rounding="floor", backend="flashinfer_mxfp4").num_kept == [20, 20]
    assert select(wide, keep_frac=0.6, rounding="floor", backend="flashinfer_mxfp4", keep_multiple=1).num_kept == [19, 19]


def test_fewer_than_top_k_are_refused() -> None:
    with pytest.raises(MaskError, match=r"keep\[0\]: found 3 experts kept; expected at least top_k = 4"):
        select(scores([range(8)], top_k=4), keep=3)
    assert select(scores([range(8)], top_k=4), keep=3, top_k=2).top_k == 2


def test_core_experts_come_first() -> None:
    """Those with the most positive mass and the highest counts stay, whatever the score says."""
    found = scores([[9, 8, 7, 6, 5, 4]], columns={"pos_gate_norm_sum": [[0, 0, 0, 1, 0, 2]], "count": [[0, 0, 0, 0, 5, 4]]})
    mask = select(found, keep=4, protect=Protect(top_mass=2, top_count=1))
    assert mask.keep == [[0, 3, 4, 5]]
    assert mask.provenance["layers"][0] == {
        "core by mass": [5, 3], "core by count": [4], "rank": [0], "lowest_kept": [5, 4.0], "best_pruned": [1, 8.0]
    }  # fmt: skip
    # An expert is named once, by the first reason.
    both = select(found, keep=3, protect=Protect(top_mass=1, top_count=2)).provenance["layers"][0]
    assert (both["core by mass"], both["core by count"]) == ([5], [4])
    with pytest.raises(MaskError, match="keep: found 2; expected at least 3, since so many are to stay: core by mass 2, core by count 1"):
        select(found, keep=2, protect=Protect(top_mass=2, top_count=1))
    # Without a column of positive mass, positive scores are it.
    assert select(scores([[3, -9, 2, 1]]), keep=2, protect=Protect(top_mass=2)).keep == [[0, 2]]
    with pytest.raises(MaskError, match="count: found no counts"):
        select(RISING, keep=2, protect=Protect(top_count=1))


def test_super_experts() -> None:
    """REAP: above the 99.5th percentile of all layers and above a tenth of the largest; "super" leaves the last quarter out."""
    peaks = np.ones((4, 100))
    peaks[0, 7] = peaks[3, 9] = 100.0
    found = scores(np.tile(np.arange(100.0), (4, 1)), columns={"max_activation": peaks})
    assert super_experts(found, "outliers") == {
        layer: {"super experts": ids} for layer, ids in enumerate([[7], [], [], [9]])
    }  # fmt: skip
    assert list(super_experts(found, "super")) == [0, 1, 2]
    mask = select(found, keep=2, protect=Protect(super_experts="super"))
    assert mask.keep == [[7, 99], [98, 99], [98, 99], [98, 99]]
    assert select(found, keep=2, protect=Protect(super_experts="outliers")).keep[3] == [9, 99]
    with pytest.raises(MaskError, match="max_activation: found no such column"):
        select(RISING, keep=2, protect=Protect(super_experts="super"))


MATH, CHAT = [[60.0, 30.0, 10.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.1, 0.2, 0.3, 0.4]]
DOMAINS = scores([[60.0, 30.0, 10.1, 0.2, 0.3, 0.4]], {"math": MATH, "chat": CHAT})


def test_every_tag_keeps_its_best() -> None:
    assert select(DOMAINS, keep=3).keep == [[0, 1, 2]]
    mask = select(DOMAINS, keep=3, protect=Protect(tag_top=1))
    assert mask.keep == [[0, 1, 5]]
    assert mask.provenance["layers"][0]["best of tag chat"] == [5]
    with pytest.raises(MaskError, match="expected at least 4, since so many are to stay: best of tag math 2, best of tag chat 2"):
        select(DOMAINS, keep=3, protect=Protect(tag_top=2))
    with pytest.raises(MaskError, match="found scores of one tag, or of none"):
        select(RISING, keep=3, protect=Protect(tag_top=1))


def test_coverage_set() -> None:
    mass = np.array([1.0, 6.0, 0.0, 3.0])
    assert coverage_set(mass, 0.5) == [1]
    assert coverage_set(mass, 0.6) == [1]
    assert coverage_set(mass, 0.61) == [1, 3]
    assert coverage_set(mass, 0.9) == [1, 3]
    assert coverage_set(mass, 1.0) == [1, 3, 0]
    assert coverage_set(np.zeros(4), 0.9) == []
    # Ten equal parts: sums of floats must not ask for one more.
    assert len(coverage_set(np.full(10, 0.1), 0.3)) == 3


def test_union_of_tags() -> None:
    """Experts that hold 90 % of a tag's mass: 0 and 1 of math, 5, 4 and 3 of chat; and as a mask no others."""
    mask = select(DOMAINS, keep=5, union=Union(0.9, core=1))
    assert mask.keep == [[0, 1, 3, 4, 5]]
    why = mask.provenance["layers"][0]
    assert (why["union core"], why["coverage of tag math"], why["coverage of tag chat"]) == ([0], [1], [5, 4, 3])
    assert select(DOMAINS, keep=6, union=Union(0.9, core=1)).keep == [[0, 1, 3, 4, 5]]
    # A checkpoint's layers are filled up by rank.
    assert select(DOMAINS, keep=6, union=Union(0.9, core=1), target="checkpoint").keep == [[0, 1, 2, 3, 4, 5]]


def test_a_union_is_cut_to_its_cap() -> None:
    # Shares added: math .6 .3 .1, chat .1 .2 .3 .4: 0, 5, then 1 and 4 alike.
    assert select(DOMAINS, keep=2, union=Union(0.9, core=1)).keep == [[0, 5]]
    assert select(DOMAINS, keep=3, union=Union(0.9, core=1)).keep == [[0, 1, 5]]
    # Raw masses, as the study added them: math drowns chat.
    raw = select(DOMAINS, keep=3, union=Union(0.9, core=1, normalise=False))
    assert raw.keep == [[0, 1, 5]]
    assert raw.provenance["layers"][0]["union, cut from 5"] == [0, 1, 5]
    weighted = scores(DOMAINS.values, {"math": MATH, "chat": CHAT}, parameters={"tags": {"math": 1.0, "chat": 9.0}})
    assert select(weighted, keep=2, union=Union(0.9, core=1)).keep == [[4, 5]]
    # What has to stay goes before it, and the cap holds.
    assert select(DOMAINS, keep=2, union=Union(0.9, core=1), protect=Protect(top_mass=2)).keep == [[0, 1]]


def test_effective_number_and_budgets() -> None:
    """(sum m)^2 / sum m^2, and a total that is shared by it (spec/metrics.md 3.5)."""
    assert effective_number(np.array([[1.0, 1, 1, 1], [4, 0, 0, 0], [3, 1, 0, 0]])).tolist() == [4.0, 1.0, 1.6]
    # 6 of 12, mean 2.2: raw 3.6, 0.9, 1.5 -> 4, 1, 1 (Python's round of 1.45), in all 6.
    assert spread([4.0, 1.0, 1.6], 6, 1, 4) == [4, 1, 1]
    # One too few: the largest first; one too many: from the smallest first, cyclically.
    assert spread([2.0, 2.0, 2.0], 7, 1, 8) == [3, 2, 2]
    assert spread([2.0, 2.0, 2.0], 8, 1, 8) == [3, 3, 2]
    assert spread([10.0, 1.0, 1.0], 12, 2, 6) == [6, 3, 3]
    assert spread([1.0, 1.0], 100, 1, 8) == [8, 8]
    assert spread([0.0, 0.0], 4, 1, 8) == [2, 2]
    found = scores([[1.0, 1, 1, 1], [4, 0, 0, 0], [3, 1, 0, 0]])
    with pytest.raises(MaskError, match="minimum, maximum: found 1, 1, which 6 experts in 3 layers cannot meet"):
        select(found, keep=2, by_layer="neff", maximum=1)
    with pytest.raises(MaskError, match="expected minimum at most 2, maximum at least 2"):
        select(found, keep=2, by_layer="neff", minimum=3)
    mask = select(found, keep=2, by_layer="neff")
    assert mask.num_kept == [4, 1, 1]
    assert mask.provenance["selection"]["neff"] == [4.0, 1.0, 1.6]
    assert select(found, keep_frac=0.5, by_layer="neff", minimum=2).num_kept == [2, 2, 2]
    assert select(found, keep_frac=0.75, by_layer="neff", minimum=2, maximum=3).num_kept == [3, 3, 3]


def test_uniform_layers_or_an_error() -> None:
    found = scores([[1.0, 1, 1, 1], [4, 0, 0, 0]])
    with pytest.raises(MaskError, match="found 1 to 3 experts in a layer; expected one number, which a GptOssForCausalLM checkpoint has"):
        select(found, keep=2, by_layer="neff", target="checkpoint")
    with pytest.raises(MaskError, match="minimum, maximum: found 2, None; expected none, where all layers keep the same number"):
        select(found, keep=2, minimum=2)
    with pytest.raises(MaskError, match="minimum, maximum: found 3, 2"):
        select(found, keep=2, by_layer="neff", minimum=3, maximum=2)
    with pytest.raises(MaskError, match="multiple: found 4; expected 1 where layers keep different numbers"):
        select(found, keep=4, by_layer="neff", keep_multiple=4)


def test_the_20b_shape() -> None:
    values = np.random.default_rng(0).lognormal(size=(24, 32))
    mask = select(Scores("reap", GPT_OSS_20B, values, "k", "d"), keep_frac=0.60, keep_multiple=4, target="checkpoint")
    assert mask.num_kept == [20] * 24
    for layer, row in enumerate(mask.keep):
        assert row == sorted(np.argsort(-values[layer])[:20].tolist())
