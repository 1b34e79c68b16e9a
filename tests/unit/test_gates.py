"""Thresholds as data, and the study's own rows: entered as numbers, they get its verdicts (spec/metrics.md 7.4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from softprune.evaluate.errors import GatesError
from softprune.evaluate.gates import NEAR_LOSSLESS, Gates, RowDeltas, check_row, read, shipped

# Name: rows of (ppl of the base, difference, CC in percentage points, mean p, JS2D), and what fails; () passes.
STUDY: dict[str, tuple[list[tuple[float, ...]], tuple[str, ...]]] = {
    "base vs base, bigblocks": ([(5.449, 0, 0, 0, 0), (4.514, 0, 0, 0, 0)], ()),
    "no-op rewrite keep32, bigblocks": ([(5.449, 0, 0, 0, 0), (4.514, 0, 0, 0, 0)], ()),
    "no-op, other regime": ([(5.595, 0, 0, 0, 0), (4.540, 0, 0, 0, 0)], ()),
    "keep24 uniform, bigblocks": ([(5.449, 0.212, 0.016, -0.0103, 0.0060), (4.514, 0.154, 0.026, -0.0097, 0.0031)], ()),
    "keep24 budgeted (core4), bigblocks": ([(5.465, 0.160, 0.004, -0.0092, 0.0059)], ()),
    "keep24 budgeted, small": ([(5.725, 0.150, -0.034, -0.0081, 0.0233)], ("js2d",)),
    "profile2k_v2": ([(5.725, 0.202, -0.028, -0.0091, 0.0238)], ("js2d",)),
    "w_conflict=-1": ([(5.725, 0.207, -0.026, -0.0092, 0.0236)], ("js2d",)),
    "corefix": ([(5.245, 1.051, 0.068, -0.0232, 0.0543)], ("js2d", "mean_prob", "ppl")),
    "keep24, first version": (
        [(5.651, 1.235, 0.043, -0.0284, 0.1082), (4.332, 0.990, 0.027, -0.0290, 0.0539)], ("js2d", "mean_prob", "ppl"),
    ),
    "keep20": ([(5.718, 0.485, 0.053, -0.0210, 0.0252), (4.671, 0.383, 0.065, -0.0216, 0.0128)], ("js2d", "mean_prob", "ppl")),
}  # fmt: skip


def deltas(row: tuple[float, ...]) -> RowDeltas:
    ppl, delta, cc, mean_prob, js2d = row
    return RowDeltas(ppl, delta, cc / 100, mean_prob, js2d)


@pytest.mark.parametrize("rule", ["min", "max"])
@pytest.mark.parametrize("name", STUDY)
def test_the_studys_rows_get_its_verdicts(name: str, rule: str) -> None:
    """Under its own thresholds of confident conflict; no row of it changes with the rule of the perplexity."""
    gates = read(NEAR_LOSSLESS, cc_thresholds="own", ppl_rule=rule)
    rows, expected = STUDY[name]
    failed = {check.metric for row in rows for check in check_row(deltas(row), gates) if not check.passed}
    assert tuple(sorted(failed)) == expected


def test_a_pack_that_fails_where_union_passes() -> None:
    tool = deltas((9.0, -0.060, 0.0, 0.0, 0.0213))
    assert [check.metric for check in check_row(tool, read(NEAR_LOSSLESS)) if not check.passed] == ["js2d"]


@pytest.mark.parametrize(
    ("base", "delta", "strict", "wide"),
    [(10.0, 0.3, False, True), (4.0, 0.22, False, True), (4.0, 0.19, True, True), (10.0, 0.25, True, True), (10.0, 0.51, False, False),
     (4.0, 0.251, False, False), (4.0, -0.22, False, True)],
)  # fmt: skip
def test_both_limits_of_the_perplexity_or_the_wider(base: float, delta: float, strict: bool, wide: bool) -> None:
    for rule, expected in (("min", strict), ("max", wide)):
        check = check_row(RowDeltas(base, delta, 0, 0, 0), read(NEAR_LOSSLESS, ppl_rule=rule))[0]
        assert (check.metric, check.passed) == ("ppl", expected)
        assert check.limit == pytest.approx((min if rule == "min" else max)(0.25, 0.05 * base))


@pytest.mark.parametrize("sign", [1, -1])
def test_limits_hold_on_both_sides_and_may_be_reached(sign: int) -> None:
    gates = read(NEAR_LOSSLESS)
    at = RowDeltas(100.0, sign * 0.25, sign * 0.002, sign * 0.02, 0.02)
    assert all(check.passed for check in check_row(at, gates))
    over = RowDeltas(100.0, sign * 0.2501, sign * 0.00201, sign * 0.0201, 0.0201)
    assert not any(check.passed for check in check_row(over, gates))
    assert [check.value for check in check_row(over, gates)] == [over.ppl, over.cc_rate, over.mean_prob, over.js2d]


def test_near_lossless_is_the_studys() -> None:
    gates = read(NEAR_LOSSLESS)
    assert NEAR_LOSSLESS in shipped()
    assert (gates.max_abs_delta_ppl, gates.max_rel_delta_ppl, gates.max_abs_delta_cc_rate) == (0.25, 0.05, 0.002)
    assert (gates.max_abs_delta_mean_prob, gates.max_js2d) == (0.02, 0.02)
    assert gates.primary_rows == [("UNION", 1024), ("UNION", 2048)]
    assert (gates.ppl_rule, gates.cc_thresholds, gates.cc_metric, gates.gate_packs) == ("min", "base", "cc_rate_base_thr", "primary")


DATA: dict[str, Any] = json.loads(read(NEAR_LOSSLESS).model_dump_json())
THRESHOLDS = [name for name in Gates.model_fields if name.startswith("max_")]


@pytest.mark.parametrize("missing", [*THRESHOLDS, "primary_pack", "primary_seq_lens", "name", "format", "version"])
def test_a_threshold_that_is_missing_is_no_zero(missing: str, tmp_path: Path) -> None:
    path = tmp_path / "gates.json"
    path.write_text(json.dumps({name: value for name, value in DATA.items() if name != missing}))
    with pytest.raises(GatesError, match=rf"gates\.json: {missing}: found nothing; expected a value"):
        read(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_js2d": -1}, "max_js2d: found -1"), ({"max_js2d": "0.02"}, "max_js2d: found '0.02'"),
        ({"max_js2d": True}, "max_js2d: found True"),
        ({"max_jsd": 1}, "max_jsd: found 1; expected no such key"), ({"ppl_rule": "mean"}, "ppl_rule: found 'mean'"),
        ({"primary_seq_lens": []}, "primary_seq_lens: found []"), ({"version": 2}, "version: found 2"),
        ({"format": "x"}, "format: found 'x'"),
    ],
)  # fmt: skip
def test_the_file_is_strict(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "gates.json"
    path.write_text(json.dumps(DATA | change))
    with pytest.raises(GatesError) as caught:
        read(str(path))
    assert message in str(caught.value)


def test_no_thresholds_at_all(tmp_path: Path) -> None:
    path = tmp_path / "gates.json"
    for text in ("{", "[]", '{"max_js2d": NaN}'):
        path.write_text(text)
        with pytest.raises(GatesError, match=r"gates\.json"):
            read(str(path))
    path.write_text(json.dumps(DATA | {"max_js2d": float("nan")}))
    with pytest.raises(GatesError, match="max_js2d: found nan"):
        read(str(path))
    with pytest.raises(GatesError, match=r"lossless: found No such file.*one of near-lossless-v1"):
        read("lossless")


def test_options_take_the_files_place(tmp_path: Path) -> None:
    path = tmp_path / "gates.json"
    path.write_text(json.dumps({name: value for name, value in DATA.items() if name not in ("ppl_rule", "cc_thresholds", "gate_packs")}))
    assert read(str(path)) == read(NEAR_LOSSLESS)
    assert read(str(path), gate_packs="all", ppl_rule=None).gate_packs == "all"
