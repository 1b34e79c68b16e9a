"""A pair of evaluations: differences with intervals, and the verdicts PASS, FAIL, INCOMPLETE and INVALID."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from softprune.cli import app
from softprune.evaluate.bootstrap import Drawn, Interval, cc_rates, draw_blocks
from softprune.evaluate.evaluation import of
from softprune.evaluate.gate_result import GateResult
from softprune.evaluate.gates import NEAR_LOSSLESS, read
from softprune.evaluate.metrics import MetricSettings
from softprune.evaluate.pair import FEW_TOKENS, MARGIN, MAX_BIAS, MIN_DENSITY, MIN_TOKENS, compare
from softprune.evaluate.plane import confident_conflict
from tests.unit.evaluations import Blocks, cell, document, of_the_study, scored

BASE, NEAR, FAR = document(), document(0.005), document(0.4, 0.3)


def verdict(base: Any, candidate: Any, **options: str) -> GateResult:
    return compare(of(base, "base.json"), of(candidate, "candidate.json"), read(NEAR_LOSSLESS, **options))


@functools.cache
def far() -> GateResult:
    return verdict(BASE, FAR)


def test_the_same_twice_passes_and_every_interval_holds_zero() -> None:
    for documents in ((BASE, BASE), (BASE, document())):
        result = verdict(*documents)
        assert (result.verdict, result.exit_code, result.problems, len(result.rows)) == ("PASS", 0, [], 3)
        for row in result.rows:
            assert len(row.delta) == 6
            assert all((one.value, one.low, one.high) == (0, 0, 0) for one in row.delta.values())
            assert (row.js2d.raw, row.js2d.low, row.js2d.high, row.coarse.high) == (0, 0, 0, 0)


def test_what_is_near_passes_and_what_is_far_fails() -> None:
    settings = MetricSettings(xbins=16, ybins=12)
    assert verdict(document(settings=settings), document(0.005, settings=settings)).verdict == "PASS"
    near = verdict(BASE, NEAR)
    assert (near.verdict, near.exit_code) == ("INCOMPLETE", 2)
    assert all(re.match(r"UNION@\d+: too few tokens for JS2D: 0\.\d of \d+ moved", problem) for problem in near.problems)
    assert [row.passed for row in near.rows] == [None] * 3
    result = far()
    assert (result.verdict, result.exit_code) == ("FAIL", 1)
    first = result.rows[0]
    assert {check.metric for check in first.checks if not check.passed} >= {"ppl", "mean_prob"}
    assert [(row.pack, row.seq_len, row.primary) for row in result.rows] == [
        ("UNION", 1024, True),
        ("UNION", 2048, True),
        ("code", 1024, False),
    ]
    # Both ways: a candidate that is better by more than the limit is no pruned copy of the base.
    assert verdict(FAR, BASE).verdict == "FAIL"


def test_differences_are_those_of_the_files() -> None:
    settings = MetricSettings(cc_quantile=0.4)
    documents = [document(shift, settings=settings, rows=(("UNION", 1024),), tokens=300) for shift in (0.0, 0.8)]
    result = verdict(*documents)
    one, other = (of(side, "e").cell("UNION", 1024) for side in documents)
    delta = {name: interval.value for name, interval in result.rows[0].delta.items()}
    for name in ("ppl", "mean_prob", "mean_entropy", "cc_rate"):
        assert delta[name] == other.metrics[name] - one.metrics[name]
    assert delta["rel_ppl"] == delta["ppl"] / one.metrics["ppl"]
    # Under the base's thresholds, bin by bin.
    x, h = one.metrics["x_thr"], one.metrics["h_thr"]
    rates = [
        sum(int(side.counts[i, j]) for i in range(160) for j in range(120) if (i + 0.5) / 160 <= x and (j + 0.5) / 120 <= h) / side.tokens
        for side in (one, other)
    ]
    assert delta["cc_rate_base_thr"] == pytest.approx(rates[1] - rates[0], abs=1e-15)
    assert result.rows[0].candidate["cc_rate_base_thr"] == pytest.approx(rates[1])
    assert rates[0] == one.metrics["cc_rate"]
    assert delta["cc_rate_base_thr"] != pytest.approx(delta["cc_rate"])
    for interval in result.rows[0].delta.values():
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < interval.value < interval.high


def test_draws_are_what_repeated_blocks_give() -> None:
    """Each draw against an evaluation of the blocks that it drew, as often as it drew them."""
    settings = MetricSettings(xbins=12, ybins=9, cc_quantile=0.3)
    left, right = scored(num_blocks=10), scored(0.3, 0.5, num_blocks=10)
    draws = draw_blocks(10, seed=5)
    assert (draws.sum(1) == 10).all()
    assert (draws == draw_blocks(10, seed=5)).all()
    sides = [of(document_of(blocks, settings), "e").cell("UNION", 1024).blocks for blocks in (left, right)]
    assert sides[0] is not None
    assert sides[1] is not None
    drawn = [Drawn.of(side, draws, settings.plane, 0.3) for side in sides]
    across = cc_rates(sides[1], draws, settings.plane, drawn[0].bins)
    for number in range(15):
        times = draws[number].astype(int)
        chosen = np.repeat(np.arange(10), times)
        base, candidate = (cell([blocks[i] for i in chosen], settings)["model"] for blocks in (left, right))
        for found, expected in zip(drawn, (base, candidate), strict=True):
            assert found.ppl[number] == pytest.approx(expected["ppl"])
            assert found.mean_prob[number] == pytest.approx(expected["mean_prob"])
            assert found.mean_entropy[number] == pytest.approx(expected["mean_entropy"])
            assert found.cc_rate[number] == pytest.approx(expected["cc_rate"], abs=1e-15)
        counts = np.array(candidate["hist2d_x_H"]["counts"]).reshape(12, 9)
        bins = settings.plane.low_bins(base["x_thr"], base["h_thr"])
        assert across[number] == pytest.approx(confident_conflict(counts, bins)["LL"] / candidate["kept_tokens"], abs=1e-15)


def document_of(blocks: Blocks, settings: MetricSettings) -> Any:
    found = document(settings=settings, rows=(("UNION", 1024),), num_blocks=len(blocks))
    found["packs"][0]["seq"]["1024"] = cell(blocks, settings)
    return found


def test_intervals_cover_the_truth() -> None:
    """The truth is the difference over very many tokens; the intervals are of 24 blocks."""
    rows = (("UNION", 1024),)
    laws, none = ((0.0, 0.0), (0.2, 0.3)), MetricSettings(sample_points=0)
    many = [cell(scored(*law, num_blocks=2000, seed=10**6), none)["model"] for law in laws]
    truth = {name: many[1][name] - many[0][name] for name in ("ppl", "mean_prob", "mean_entropy")}
    covered, tries = dict.fromkeys(truth, 0), 60
    for seed in range(tries):
        sides = []
        for law in laws:
            one = document(*law, MetricSettings(xbins=8, ybins=8, sample_points=0), rows, num_blocks=8, tokens=2)
            one["packs"][0]["seq"]["1024"] = cell(scored(*law, seed=seed), MetricSettings(xbins=8, ybins=8, sample_points=0))
            one["meta"]["num_blocks"] = 24
            sides.append(one)
        delta = verdict(*sides).rows[0].delta
        for name, value in truth.items():
            low, high = delta[name].low, delta[name].high
            assert low is not None
            assert high is not None
            covered[name] += low <= value <= high
    assert all(count >= 52 for count in covered.values()), f"{covered} of {tries}; 95 % are 57"


def test_intervals_of_few_blocks_hold_what_they_say() -> None:
    """Means of 8 normal values, whose plain percentile bootstrap holds the truth in less than 91 % of tries."""
    rng, tries, draws = np.random.default_rng(0), 1500, draw_blocks(8, seed=1) / 8
    covered = {"plain": 0, "widened": 0}
    for values in rng.normal(size=(tries, 8)):
        interval = Interval.of(values.mean(), draws @ values, 8)
        low, high = np.quantile(draws @ values, [0.025, 0.975])
        covered["plain"] += low <= 0 <= high
        covered["widened"] += interval.low <= 0 <= interval.high
    assert covered["plain"] < 0.91 * tries
    assert 0.935 * tries < covered["widened"] < 0.965 * tries


def test_a_row_that_is_missing() -> None:
    for side in (0, 1):
        documents = [copy.deepcopy(BASE), copy.deepcopy(BASE)]
        del documents[side]["packs"][0]["seq"]["2048"]
        result = verdict(*documents)
        assert (result.verdict, result.exit_code) == ("INCOMPLETE", 2)
        assert result.problems == [f"UNION@2048 is missing in {('base', 'candidate')[side]}.json"]
        assert len(result.rows) == 2
    short = copy.deepcopy(FAR)
    del short["packs"][0]["seq"]["2048"]
    assert verdict(BASE, short).verdict == "INCOMPLETE", "what is there may fail, but is not all"


def test_rows_that_are_not_primary() -> None:
    without = copy.deepcopy(BASE)
    del without["packs"][1]
    assert verdict(BASE, without).verdict == "PASS"
    result = verdict(BASE, without, gate_packs="all")
    assert (result.verdict, result.problems) == ("INCOMPLETE", ["code@1024 is missing in candidate.json"])
    mixed = copy.deepcopy(BASE)
    mixed["packs"][1] = copy.deepcopy(FAR["packs"][1])
    assert verdict(BASE, mixed).verdict == "PASS"
    assert verdict(BASE, mixed, gate_packs="all").verdict == "FAIL"


def meta(name: str, value: Any) -> Callable[[Any], None]:
    return lambda document: document["meta"].__setitem__(name, value)


def own(name: str, value: Any) -> Callable[[Any], None]:
    return lambda document: document["meta"]["softprune"].__setitem__(name, value)


def seen(name: str, value: Any, pack: int = 0, length: str = "1024") -> Callable[[Any], None]:
    return lambda document: document["packs"][pack]["seq"][length].__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (seen("rows_sha256", "0" * 64), "UNION@1024.rows_sha256: "),
        (seen("blocks_sha256", "0" * 64), "UNION@1024.blocks_sha256: "),
        (seen("rows_seen", 8), "UNION@1024.rows_seen: 7 in base.json, 8 in candidate.json"),
        (seen("rows_sha256", "0" * 64, 1), "code@1024.rows_sha256: "),
        (meta("entropy_topk", 10), "meta.entropy_topk: 20 in base.json, 10 in candidate.json"),
        (meta("cc_quantile", 0.2), "meta.cc_quantile: 0.15 in base.json, 0.2 in candidate.json"),
        (meta("num_blocks", 12), "meta.num_blocks: 24 in base.json, 12 in candidate.json"),
        (own("block_form", "L+1"), "meta.softprune.block_form: 'L' in base.json, 'L+1' in candidate.json"),
        (own("tokenizer_sha256", "sha256:other"), "meta.softprune.tokenizer_sha256: "),
        (own("vocabulary_size", 5000), "meta.softprune.vocabulary_size: 4096 in base.json, 5000 in candidate.json"),
    ],
)
def test_other_data_or_other_settings_are_invalid(change: Callable[[Any], None], problem: str) -> None:
    changed = copy.deepcopy(BASE)
    change(changed)
    result = verdict(BASE, changed)
    assert (result.verdict, result.exit_code, result.rows) == ("INVALID", 3, [])
    assert len(result.problems) == 1
    assert result.problems[0].startswith(problem)
    assert verdict(changed, BASE).verdict == "INVALID"


def test_other_planes_blocks_and_tokens_are_invalid() -> None:
    rows = (("UNION", 1024), ("UNION", 2048))
    one = document(rows=rows)
    for settings, field in (
        (MetricSettings(xbins=80), "hist_xbins"),
        (MetricSettings(ybins=60), "hist_ybins"),
        (MetricSettings(prob_scale="log"), "prob_scale"),
    ):
        result = verdict(one, document(settings=settings, rows=rows))
        assert result.verdict == "INVALID"
        assert field in result.problems[0]
    logs = [document(settings=MetricSettings(prob_scale="log", logp_min=low), rows=rows) for low in (-12.0, -8.0)]
    assert verdict(logs[0], logs[0]).verdict == "PASS"
    assert verdict(*logs).problems == ["meta.logp_min: -12.0 in base.json, -8.0 in candidate.json"]
    fewer = verdict(one, document(rows=rows, num_blocks=23))
    assert fewer.verdict == "INVALID"
    assert "UNION@1024.num_blocks: 24 in base.json, 23 in candidate.json" in fewer.problems
    # The same blocks, of which a token was not scored.
    dropped = copy.deepcopy(one)
    blocks = scored(seed=0)
    blocks[3] = (blocks[3][0][1:], blocks[3][1][1:])
    dropped["packs"][0]["seq"]["1024"] = cell(blocks, data="UNION1024")
    result = verdict(one, dropped)
    assert result.verdict == "INVALID"
    assert "tokens by block" in result.problems[0]
    assert verdict(one, of_the_study(one)).verdict == "INVALID", "the study's collector scores other tokens"


def test_files_of_the_study_have_no_intervals() -> None:
    result = verdict(of_the_study(BASE), of_the_study(FAR))
    assert result.verdict == "FAIL"
    row = result.rows[0]
    assert all(one.low is None and one.high is None for one in row.delta.values())
    ours = far().rows[0]
    assert {name: one.value for name, one in row.delta.items()} == {name: one.value for name, one in ours.delta.items()}
    assert (row.js2d.method, ours.js2d.method, row.js2d.low) == ("independent", "exchange", None)
    assert row.js2d.raw == pytest.approx(ours.js2d.raw)
    assert row.coarse.raw == pytest.approx(ours.coarse.raw)
    cells = (np.array([of(side, "e").cell("UNION", 1024).counts for side in (BASE, FAR)]).sum(0) > 0).sum()
    assert row.js2d.occupied_cells == cells == ours.js2d.occupied_cells
    assert row.js2d.bias == pytest.approx((cells - 1) / (4 * row.base["tokens"]))
    assert verdict(of_the_study(BASE), of_the_study(BASE)).verdict == "PASS"
    # One token more on one side, as when one was rounded out of its plane.
    other = copy.deepcopy(BASE)
    blocks = scored(seed=0)
    blocks[3] = (blocks[3][0][1:], blocks[3][1][1:])
    other["packs"][0]["seq"]["1024"] = cell(blocks, data="UNION1024")
    assert verdict(of_the_study(BASE), of_the_study(other)).verdict in ("PASS", "FAIL")


def test_few_blocks_have_no_intervals() -> None:
    few = [document(shift, num_blocks=7) for shift in (0.0, 0.1)]
    row = verdict(*few).rows[0]
    assert row.js2d.method == "independent"
    assert all(one.low is None for one in row.delta.values())


def test_which_js2d_is_judged() -> None:
    row = far().rows[0]
    check = row.checks[-1]
    assert row.js2d.bias > MAX_BIAS
    assert not row.enough_tokens
    assert (check.value, check.passed, row.passed) == (None, None, False), "other checks fail"
    assert "too few tokens for JS2D: 0.5 of 731 moved for each cell that one left or entered; 4 at least" in check.note
    settings = MetricSettings(xbins=24, ybins=18)
    row = verdict(document(settings=settings, tokens=200), document(0.6, 0.3, settings=settings, tokens=200)).rows[0]
    assert row.js2d.density is not None
    assert row.js2d.density > MIN_DENSITY
    assert row.js2d.raw > 0.02
    assert not row.enough_tokens
    assert row.checks[-1].value == row.js2d.high
    assert "upper end" in row.checks[-1].note
    settings = MetricSettings(xbins=6, ybins=6)
    row = verdict(document(settings=settings), document(0.1, settings=settings)).rows[0]
    assert (row.enough_tokens, row.checks[-1].value, row.checks[-1].note) == (True, row.js2d.raw, "raw")
    study = verdict(of_the_study(BASE), of_the_study(FAR)).rows[0]
    assert (study.enough_tokens, study.checks[-1].value) == (False, study.js2d.raw)
    assert "too few tokens" in study.checks[-1].note


ONE = (("UNION", 1024),)


def js2d_of(shift: float, blocks: list[int], seed: int = 0, **limits: float) -> GateResult:
    """A candidate that is judged by JS2D alone, on blocks of so many tokens."""
    sides = []
    for harm in (0.0, shift):
        one = document(harm, rows=ONE, num_blocks=8, tokens=2)
        tokens = [scored(harm, 0.0, 1, 2 * count, seed + k)[0] for k, count in enumerate(blocks)]
        one["packs"][0]["seq"]["1024"] = cell([(log_p[:count], h[:count]) for count, (log_p, h) in zip(blocks, tokens, strict=True)])
        one["meta"]["num_blocks"] = len(blocks)
        sides.append(of(one, "e"))
    wide = {f"max_{name}": 1e9 for name in ("abs_delta_ppl", "rel_delta_ppl", "abs_delta_cc_rate", "abs_delta_mean_prob")}
    rules = {**wide, **limits, "primary_seq_lens": [1024]}
    return compare(sides[0], sides[1], read(NEAR_LOSSLESS).model_copy(update=rules))


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ([40_000, *[0] * 15], r"blocks that are worth 1\.0 of"), ([1000, 1000, *[0] * 14], r"blocks that are worth 2\.0 of"),
        ([8000, *[2] * 15], r"blocks that are worth 1\.0 of one size; 8 at least"),
        ([31] * 16, "moved for each cell"), ([62] * 16, "moved"), ([94] * 16, "moved"), ([120] * 16, "moved"),
        ([12] * 16, f"too few tokens for JS2D: 192; {MIN_TOKENS} at least"),
    ],
)  # fmt: skip
def test_few_tokens_or_few_blocks_never_pass(blocks: list[int], why: str) -> None:
    """True JS2D is 0.1 and more, five times the limit; whatever the seed."""
    for seed in range(1 if max(blocks) > 5000 else 2):
        result = js2d_of(2.0, blocks, 100 * seed)
        assert result.verdict == "INCOMPLETE"
        assert all(re.search(why, problem) for problem in result.problems), result.problems
        # A model against itself has the same tokens, and moves none.
        same = js2d_of(0.0, blocks, 100 * seed)
        assert same.verdict == ("PASS" if sum(blocks) >= MIN_TOKENS else "INCOMPLETE")


def test_few_moved_tokens_pass_if_they_are_near_on_coarser_planes_too() -> None:
    """Each of them in a cell of its own: the fine plane alone would hide a shift of all tokens."""
    (row,) = js2d_of(0.01, [250] * 16).rows
    check = row.checks[-1]
    assert row.js2d.density is not None
    assert (row.js2d.density < 1, row.js2d.raw > 0.02, row.passed) == (True, True, True)
    assert check.note == "2 times the largest upper end of the corrected values of three planes; too few tokens for others"
    assert check.value is not None
    assert row.js2d.high is not None
    assert row.coarse.high is not None
    assert 0.02 >= check.value >= MARGIN * max(row.js2d.high, row.coarse.high)
    assert js2d_of(0.01, [120] * 16).verdict == "INCOMPLETE", f"fewer than {FEW_TOKENS} tokens"
    assert js2d_of(0.01, [250] * 16, max_js2d=check.value * 0.99).verdict == "INCOMPLETE", "twice, and not once, has to be within"


def test_few_moved_tokens_fail_if_they_show_too_much() -> None:
    """What is hidden only adds to what is seen."""
    result = js2d_of(2.0, [250] * 16)
    (check,) = (one for one in result.rows[0].checks if one.metric == "js2d")
    assert (result.verdict, check.note.split(" of")[0]) == ("FAIL", "largest lower end")
    assert check.value is not None
    assert 0.02 < check.value < 0.15  # the truth is 0.1
    assert js2d_of(0.5, [250] * 16).verdict == "INCOMPLETE", "neither near nor far"
    assert js2d_of(2.0, [120] * 16).verdict == "INCOMPLETE", f"fewer than {FEW_TOKENS} tokens"


def test_no_js2d_is_above_ln_2() -> None:
    assert js2d_of(2.0, [12] * 16, max_js2d=0.7).verdict == "PASS"


def test_another_check_that_fails_is_a_verdict() -> None:
    result = js2d_of(2.0, [31] * 16, max_abs_delta_mean_prob=0.02)
    assert (result.verdict, result.problems) == ("FAIL", [])
    assert {check.metric: check.passed for check in result.rows[0].checks}["js2d"] is None


def test_own_thresholds_are_the_studys_rule() -> None:
    base, own_rule = far().rows[0], verdict(BASE, FAR, cc_thresholds="own").rows[0]
    assert (base.checks[1].metric, base.checks[1].value) == ("cc_rate_base_thr", base.delta["cc_rate_base_thr"].value)
    assert (own_rule.checks[1].metric, own_rule.checks[1].value) == ("cc_rate", base.delta["cc_rate"].value)


def gate(folder: Path, base: Any, candidate: Any, *options: str) -> tuple[int, str]:
    for name, data in (("base", base), ("candidate", candidate)):
        (folder / f"{name}.json").write_text(data if isinstance(data, str) else json.dumps(data))
    result = CliRunner().invoke(app, ["gate", str(folder / "base.json"), str(folder / "candidate.json"), *options], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command(tmp_path: Path) -> None:
    code, output = gate(tmp_path, BASE, BASE)
    assert code == 0
    assert "PASS by near-lossless-v1" in output
    code, output = gate(tmp_path, BASE, FAR, "--out", str(tmp_path / "gate.json"))
    assert code == 1
    assert "FAIL by near-lossless-v1: UNION@1024 ppl +" in output
    assert "over the limit of" in output
    assert "UNION@2048 mean_prob -" in output
    written = json.loads((tmp_path / "gate.json").read_text())
    assert (written["format"], written["version"], written["verdict"]) == ("softprune.gate", 1, "FAIL")
    assert written["gates"]["max_js2d"] == 0.02
    assert (written["base"]["file"], written["base"]["label"], written["base"]["top_k"]) == ("base.json", "shifted by 0", 4)
    assert [row["primary"] for row in written["rows"]] == [True, True, False]
    first = written["rows"][0]
    assert set(first["delta"]) == {"ppl", "rel_ppl", "mean_prob", "mean_entropy", "cc_rate", "cc_rate_base_thr"}
    assert set(first["js2d"]) >= {
        "raw",
        "bias",
        "corrected",
        "low",
        "high",
        "coarse",
        "coarse_bias",
        "tokens",
        "occupied_cells",
        "enough_tokens",
    }
    assert [set(check) for check in first["checks"]] == [{"metric", "value", "limit", "passed", "note"}] * 4
    code, output = gate(tmp_path, BASE, FAR, "--json", "--cc-thresholds", "own", "--packs", "all", "--ppl-rule", "max")
    printed = json.loads(output)
    assert (code, printed["verdict"]) == (1, "FAIL")
    assert [printed["gates"][name] for name in ("cc_thresholds", "gate_packs", "ppl_rule")] == ["own", "all", "max"]


def test_the_command_on_what_cannot_be_compared(tmp_path: Path) -> None:
    short = copy.deepcopy(BASE)
    del short["packs"][0]["seq"]["2048"]
    code, output = gate(tmp_path, BASE, short)
    assert code == 2
    assert "candidate.json" in output
    assert "INCOMPLETE by near-lossless-v1" in output
    assert str(tmp_path) not in output
    code, output = gate(tmp_path, BASE, document(settings=MetricSettings(xbins=80)), "--out", str(tmp_path / "gate.json"))
    # A result that is passed on does not tell of its maker's folders.
    assert str(tmp_path) not in output + (tmp_path / "gate.json").read_text()
    assert code == 3
    assert "meta.hist_xbins: 160 in" in output
    assert "INVALID" in output
    broken = copy.deepcopy(BASE)
    broken["packs"][0]["seq"]["1024"]["model"]["mean_prob"] = math.nan
    code, output = gate(tmp_path, BASE, broken, "--out", str(tmp_path / "gate.json"))
    assert code == 3
    assert "mean_prob: found nan; expected a finite number" in output
    assert str(tmp_path) not in output
    written = json.loads((tmp_path / "gate.json").read_text())
    assert (written["verdict"], written["candidate"]["label"]) == ("INVALID", "candidate.json")
    assert written["problems"][0].startswith("candidate.json: packs[0].seq.1024.model.mean_prob: found nan")
    assert gate(tmp_path, BASE, "{")[0] == 3
    assert gate(tmp_path, BASE, BASE, "--gates", "lossless")[0] == 3
    assert gate(tmp_path, BASE, BASE, "--out", str(tmp_path / "none" / "gate.json"))[0] == 3
