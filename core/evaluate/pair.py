"""Two evaluations and a set of gates give a verdict.

PASS and FAIL are about numbers. INCOMPLETE: a row that must be there is missing on a side. INVALID: the two were not made from the same
data in the same way, so that their numbers must not be compared; none are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softprune.errors import shortened
from softprune.evaluate.bootstrap import Drawn, Interval, cc_rates, draw_blocks
from softprune.evaluate.evaluation import Cell, Evaluation
from softprune.evaluate.gate_result import GateResult, Row, Verdict
from softprune.evaluate.gates import Gates, RowDeltas, check_row
from softprune.evaluate.js2d import MIN_BLOCKS, Js2d, effective_blocks, independent, paired
from softprune.evaluate.plane import COARSE, Plane, confident_conflict

MAX_BIAS = 0.005
"""Raw JS2D is judged where its bias stays below this: a quarter of the limit of near-lossless-v1 (spec/metrics.md 2)."""
MIN_TOKENS = 200
"""Fewer cannot pass by JS2D, unless the limit is ln 2, which it never exceeds. If all cells were alone, it would be ln 2 for each token
that moved; then, of 200 of which as few moved as a JS2D of 0.04 takes at least, 2.4 % of all draws stay within 0.02."""
MIN_DENSITY = 4.0
"""Tokens that moved for each cell that one left or entered, from which on the corrected value's interval is judged; see `_judged`."""
COARSER = 16
"""Bins a side that one bin of the coarsest plane is made of."""
FEW_TOKENS, MARGIN = 2000, 2.0
"""Where fewer moved, so many tokens pass if this times the largest upper end of three planes is within the limit; see `_judged`."""
TOO_FEW = "too few tokens for JS2D"
_META = ("entropy_topk", "cc_quantile", "hist_xbins", "hist_ybins", "prob_scale", "num_blocks")
_META_LOG = ("logp_min", "logp_max")
_SHOWN = ("ppl", "mean_prob", "mean_entropy", "cc_rate")
_UNTOLD = "raw; too few tokens to tell it from its bias"
_OWN = ("format", "version", "block_form", "tokenizer_sha256", "vocabulary_size")


def compare(base: Evaluation, candidate: Evaluation, gates: Gates, seed: int = 0) -> GateResult:
    """Judge a candidate.

    Args:
        base, candidate: evaluations of the unpruned and of the pruned model.
        gates: thresholds.
        seed: of bootstrap draws and of halves.
    """
    wrong = [*_other_settings(base, candidate), *_other_data(base, candidate)]
    if wrong:
        return _result("INVALID", base, candidate, gates, wrong, [])
    both = [key for key in base.cells if key in candidate.cells]
    wanted = list(gates.primary_rows)
    if gates.gate_packs == "all":
        wanted += [key for key in {**base.cells, **candidate.cells} if key not in wanted]
    missing = [
        f"{pack}@{length} is missing in {_file(side)}"
        for pack, length in wanted
        for side in (base, candidate)
        if (pack, length) not in side.cells
    ]
    keys = [key for key in gates.primary_rows if key in both]
    keys += [key for key in both if key not in keys]
    rows = [_row(base, candidate, key, gates, seed) for key in keys]
    failed = any(row.gated and row.passed is False for row in rows)
    checks = [(row, check) for row in rows if row.gated and not failed for check in row.checks]
    undecided = [f"{row.pack}@{row.seq_len}: {check.note}" for row, check in checks if check.passed is None]
    incomplete = missing or undecided
    return _result("INCOMPLETE" if incomplete else "FAIL" if failed else "PASS", base, candidate, gates, missing + undecided, rows)


def invalid(base: str, candidate: str, gates: Gates, problem: str) -> GateResult:
    """The verdict on files of which one cannot be read; they go by their names."""
    sides = [
        {"label": Path(name).name, "file": Path(name).name, "fingerprint": None, "mask": None, "num_kept": None, "top_k": None}
        for name in (base, candidate)
    ]
    return GateResult("INVALID", gates, sides[0], sides[1], [problem], [])


def _result(verdict: Verdict, base: Evaluation, candidate: Evaluation, gates: Gates, problems: list[str], rows: list[Row]) -> GateResult:
    sides = [
        {"label": side.label, "file": _file(side), **{name: side.own.get(name) for name in ("fingerprint", "mask", "num_kept")},
         "top_k": side.meta.get("top_k")}
        for side in (base, candidate)
    ]  # fmt: skip
    return GateResult(verdict, gates, sides[0], sides[1], problems, rows)


def _other_settings(base: Evaluation, candidate: Evaluation) -> Iterator[str]:
    names = _META + (_META_LOG if base.plane.scale == "log" else ())
    yield from _differences("meta", names, base.meta, candidate.meta, base, candidate)
    yield from _differences("meta.softprune", _OWN, base.own, candidate.own, base, candidate)


def _other_data(base: Evaluation, candidate: Evaluation) -> Iterator[str]:
    for key, one in base.cells.items():
        if (other := candidate.cells.get(key)) is None:
            continue
        at = f"{one.pack}@{one.seq_len}"
        differences = list(_differences(at, tuple(one.identity), one.identity, other.identity, base, candidate))
        yield from differences
        # The study drops tokens whose p or H is rounded to more than 1, so that its sides may differ by a few.
        if not differences and one.blocks and other.blocks and not (one.blocks.tokens == other.blocks.tokens).all():
            yield f"{at}: {one.tokens} tokens by block in {_file(base)} are not the {other.tokens} in {_file(candidate)}"


def _differences(
    at: str, names: tuple[str, ...], one: Mapping[str, Any], other: Mapping[str, Any], base: Evaluation, candidate: Evaluation
) -> Iterator[str]:
    for name in names:
        if one.get(name) != other.get(name):
            yield f"{at}.{name}: {shortened(one.get(name))} in {_file(base)}, {shortened(other.get(name))} in {_file(candidate)}"


def _file(side: Evaluation) -> str:
    """Its bare name: a result that is passed on should not tell of its maker's folders."""
    return Path(side.source).name


def _row(base: Evaluation, candidate: Evaluation, key: tuple[str, int], gates: Gates, seed: int) -> Row:
    one, other, plane = base.cell(*key), candidate.cell(*key), base.plane
    delta = _deltas(one, other, plane, float(base.meta["cc_quantile"]), seed)
    js2d, coarse, coarser = (_divergence(one, other, seed, plane, by) for by in (1, COARSE, COARSER))
    tokens = min(one.tokens, other.tokens)
    # Where it is not measured, what independent samples would have (spec/metrics.md 2).
    enough = js2d.bias <= MAX_BIAS if js2d.method == "exchange" else tokens >= js2d.occupied_cells / (4 * MAX_BIAS)
    ours = one.blocks is not None and other.blocks is not None
    judged, form = _judged((js2d, coarse, coarser), enough, tokens, gates.max_js2d) if ours else (js2d.raw, "raw" if enough else _UNTOLD)
    rate = delta[gates.cc_metric].value
    deltas = RowDeltas(one.metrics["ppl"], delta["ppl"].value, rate, delta["mean_prob"].value, judged, form)
    shown: list[dict[str, Any]] = [
        {name: side.metrics[name] for name in _SHOWN} | {"tokens": side.tokens, "blocks_sha256": side.identity["blocks_sha256"]}
        for side in (one, other)
    ]
    shown[1]["cc_rate_base_thr"] = one.metrics["cc_rate"] + delta["cc_rate_base_thr"].value
    primary = key in gates.primary_rows
    return Row(
        *key, primary, primary or gates.gate_packs == "all", shown[0], shown[1], delta, js2d, coarse, enough, check_row(deltas, gates)
    )


def _judged(planes: Sequence[Js2d], enough: bool, tokens: int, limit: float) -> tuple[float | None, str]:
    """The value of JS2D that is judged, None if there is none; and which it is, or why.

    Args:
        planes: of the plane itself, and of coarser ones.
        enough: whether its bias is small.
        tokens: on the side that has fewer.
        limit: of the gates.

    Few tokens must not make passing easier. They only add to the raw value: JS2D is jointly convex, so that its mean over samples is no
    less than that of the laws (Jensen), and a raw value within the limit passes. The corrected value lies too low where hardly two tokens
    move between the same cells, since what is real no longer shows there; its interval then says nothing, nor does it where few blocks
    hold all tokens. In simulations with a known truth the upper end lay below it in none of 192 tries with `MIN_DENSITY` or more, in 2 of
    64 from 3 to 4, and in 1 of 5 from 2 to 3. (Tokens in a cell do not tell: most may lie in one cell, and stay there.)

    With fewer, a candidate that is near enough passes all the same. What thin cells hide is seen on coarser planes, whose JS2D is no more
    than the plane's own (data-processing inequality) and whose cells are full sooner; what only the fine plane shows is hidden there. In
    simulations with a known truth (tests/evidence/test_js2d_density.py), it was at most 1.52 times the largest upper end of the three,
    with 2,000 to 64,000 tokens, and 1.96 times with 500. And one that is far fails, since what is hidden only adds to what is seen.
    """
    js2d = planes[0]
    if enough and tokens >= MIN_TOKENS:
        return js2d.raw, "raw"
    if tokens < MIN_TOKENS and limit < math.log(2):
        return None, f"{TOO_FEW}: {tokens:,}; {MIN_TOKENS} at least"
    if js2d.raw <= limit:
        return js2d.raw, "raw, which few tokens only raise"
    if js2d.high is None:
        return None, f"{TOO_FEW}: they lie in blocks that are worth {js2d.worth:.1f} of one size; {MIN_BLOCKS} at least"
    if (density := js2d.density or 0) < MIN_DENSITY:
        bound = MARGIN * max(one.high for one in planes if one.high is not None)
        if tokens >= FEW_TOKENS and bound <= limit:
            return bound, f"{MARGIN:g} times the largest upper end of the corrected values of three planes; too few tokens for others"
        least = max(one.low for one in planes if one.low is not None)
        if tokens >= FEW_TOKENS and least > limit:
            return least, "largest lower end of the corrected values of three planes, which more tokens would only raise"
        return None, f"{TOO_FEW}: {density:.1f} of {tokens:,} moved for each cell that one left or entered; {MIN_DENSITY:g} at least"
    return js2d.high, "upper end of the corrected value; too few tokens for the raw one"


def _deltas(one: Cell, other: Cell, plane: Plane, cc_quantile: float, seed: int) -> dict[str, Interval]:
    values = {name: other.metrics[name] - one.metrics[name] for name in _SHOWN}
    values["rel_ppl"] = values["ppl"] / one.metrics["ppl"]
    bins = plane.low_bins(one.metrics["x_thr"], one.metrics["h_thr"])
    base_rate, rate = (confident_conflict(side.counts, bins)["LL"] / side.tokens for side in (one, other))
    values["cc_rate_base_thr"] = rate - base_rate
    if one.blocks is None or other.blocks is None or (num_blocks := int(np.count_nonzero(one.blocks.tokens))) < MIN_BLOCKS:
        return {name: Interval(value) for name, value in values.items()}
    draws = draw_blocks(len(one.blocks.tokens), seed)
    left, right = (Drawn.of(blocks, draws, plane, cc_quantile) for blocks in (one.blocks, other.blocks))
    drawn = {name: getattr(right, name) - getattr(left, name) for name in _SHOWN}
    drawn["rel_ppl"] = drawn["ppl"] / left.ppl
    # The base's thresholds define the region that is measured, so that they stay; where a quantile lies on the border of two large bins,
    # drawing them anew would ask about another region in every other draw.
    fixed = [cc_rates(blocks, draws, plane, np.tile(bins, (len(draws), 1))) for blocks in (one.blocks, other.blocks)]
    drawn["cc_rate_base_thr"] = fixed[1] - fixed[0]
    return {name: Interval.of(value, drawn[name], num_blocks) for name, value in values.items()}


def _divergence(one: Cell, other: Cell, seed: int, plane: Plane, by: int) -> Js2d:
    """JS2D of planes of `by` x `by` bins in one."""
    if one.blocks and other.blocks and np.count_nonzero(one.blocks.tokens) >= MIN_BLOCKS:
        cells = [plane.coarse(side.cells, by) for side in (one.blocks, other.blocks)]
        return paired(cells[0], cells[1], one.blocks.tokens, seed)
    index = plane.coarse(np.arange(one.counts.size), by)
    counts = [np.bincount(index, side.counts.reshape(-1)).astype(np.int64) for side in (one, other)]
    found = independent(counts[0], counts[1])
    return found if one.blocks is None or other.blocks is None else replace(found, worth=effective_blocks(one.blocks.tokens))
