"""A pair's section: checks, per-pack deltas with their intervals, what the two sides are, and their planes where they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from softprune.evaluate.evaluation import Evaluation
from softprune.evaluate.served import mask_name
from softprune.report import verdict
from softprune.report.documents import Delta, Gate, Row
from softprune.report.evaluation import landscape
from softprune.report.numbers import Form, fixed, interval, kept, number, percent, points, short, shortened_hashes, signed, signed_percent
from softprune.report.page import Section, Summary, render
from softprune.report.planes import Figure, difference, landscapes, marginals
from softprune.report.table import Cell, Table

META = (
    ("engine", "engine"), ("engine's version", "sglang_version", "vllm_version"), ("GPU", "gpu_name"),
    ("blocks of each pack", "num_blocks"), ("form of blocks", "softprune.block_form"), ("tokenizer", "softprune.tokenizer_sha256"),
    ("top tokens of H", "entropy_topk"),
    ("confident-conflict quantile", "cc_quantile"), ("bins of p", "hist_xbins"), ("bins of H", "hist_ybins"), ("scale of p", "prob_scale"),
    ("date", "softprune.date"),
)  # fmt: skip
"""Lines of the table of what was compared, and keys of an evaluation's meta."""
_RESULTS = {True: Cell("pass", mark="pass"), False: Cell("FAIL", mark="fail"), None: Cell("not judged")}
NOTE_JS2D = (
    "JS2D is the Jensen-Shannon divergence of the two planes in nats. Few tokens alone make it larger: bias is that part, corrected is the "
    "rest. Intervals are 95 %: of differences from drawing blocks anew, of JS2D from halves of the blocks."
)


def gate_section(
    gate: Gate, base: Evaluation | None, candidate: Evaluation | None, id_: str, title: str, brief: bool = False
) -> tuple[Summary, Section]:
    """The section of a pair.

    Args:
        gate: the result.
        base, candidate: for the planes, which a gate's result has not.
        id_: anchor.
        title: heading.
        brief: only planes of primary rows and no marginals, since a sweep has many pairs.
    """
    found = verdict.summary(gate)
    planes = [] if base is None or candidate is None else _planes(gate, base, candidate, brief)
    body = render(
        "gate.html",
        summary=found,
        problems=[shortened_hashes(problem) for problem in gate.problems],
        brief=brief,
        checks=_checks(f"Checks of {gate.gates.name}", [row for row in gate.rows if row.judged]),
        others=_checks("Checks of other rows, on which the verdict does not rest", [row for row in gate.rows if not row.judged]),
        packs=_packs(gate.rows) if gate.rows else None,
        js2d=_js2d(gate.rows) if gate.rows else None,
        note=NOTE_JS2D,
        sides=_sides(gate, base, candidate),
        planes=planes,
        thresholds=gate.gates.name,
        valid=gate.verdict != "INVALID",
    )
    return found, Section(id_, title, body, found.badge)


def _checks(caption: str, of: list[Row]) -> Table | None:
    rows: list[list[Cell | str]] = []
    for row in of:
        for check in row.checks:
            name, value, limit = verdict.columns(check)
            result = _RESULTS[check.passed]
            rows.append([Cell(name, row.name), result, value, limit, Cell(check.note, mark="long")])
    columns = ("check, candidate less base", "result", "value", "limit", "which value or limit")
    return Table(caption, columns, rows, words=(1, 4)) if rows else None


def _packs(rows: list[Row]) -> Table:
    def changed(delta: Delta, form: Form) -> Cell:
        return Cell(form(delta.value) if delta.value is not None else "–", interval(delta.model_dump(), form))

    columns = (
        "pack @ block length", "completion tokens", "PPL, base", "PPL, candidate", "ΔPPL", "ΔPPL, share", "Δ mean p", "Δ mean H",
        "confident conflicts, base → candidate", "Δ conflicts, base's thresholds", "Δ conflicts, own thresholds",
    )  # fmt: skip
    out = []
    for row in rows:
        base, candidate, delta = row.base, row.candidate, row.delta
        same = base.tokens == candidate.tokens
        out.append([
            Cell(row.name, "primary" if row.primary else ""),
            Cell(f"{base.tokens:,}" if same else f"{base.tokens:,} → {candidate.tokens:,}"),
            Cell(number(base.ppl)), Cell(number(candidate.ppl)),
            changed(delta.ppl, lambda x: signed(x, 3)), changed(delta.rel_ppl, signed_percent), changed(delta.mean_prob, signed),
            changed(delta.mean_entropy, signed), Cell(f"{percent(base.cc_rate, 3)} → {percent(candidate.cc_rate_base_thr, 3)}"),
            changed(delta.cc_rate_base_thr, points), changed(delta.cc_rate, points),
        ])  # fmt: skip
    return Table("By pack and block length, candidate less base, with 95 % intervals", columns, out)


def _js2d(rows: list[Row]) -> Table:
    columns = (
        "pack @ block length", "JS2D as it is, nats", "bias", "corrected", "bins 4 × 4 in one", "its bias", "corrected",
        "cells with tokens", "tokens enough to judge it as it is",
    )  # fmt: skip
    out = []
    for row in rows:
        js = row.js2d
        coarse = {"low": js.coarse_low, "high": js.coarse_high}
        out.append([
            Cell(row.name), Cell(fixed(js.raw)), Cell(fixed(js.bias)), Cell(fixed(js.corrected), interval(js.model_dump(), fixed)),
            Cell(fixed(js.coarse)), Cell(fixed(js.coarse_bias)), Cell(fixed(js.coarse_corrected), interval(coarse, fixed)),
            Cell(f"{js.occupied_cells:,}"), Cell("yes" if js.enough_tokens else "no"),
        ])  # fmt: skip
    return Table("Distance of the planes", columns, out)


def _sides(gate: Gate, base: Evaluation | None, candidate: Evaluation | None) -> Table:
    """What the two are; what differs is marked."""
    sides = (gate.base, gate.candidate)
    lines: list[tuple[str, list[str]]] = [
        ("label", [side.label for side in sides]),
        ("file", [side.file or "–" for side in sides]),
        ("weights' fingerprint", [short(side.fingerprint or "unknown", 19) for side in sides]),
        ("mask", [short(mask_name(side.mask, side.fingerprint), 19) for side in sides]),
        ("experts kept a layer", ["unknown" if side.fingerprint is None else kept(side.num_kept) for side in sides]),
        ("experts per token", ["–" if side.top_k is None else str(side.top_k) for side in sides]),
    ]
    if base is not None and candidate is not None:
        lines += [(name, [_meta(side, *keys) for side in (base, candidate)]) for name, *keys in META]
    rows: list[list[Cell | str]] = [
        [name, *(Cell(text, mark="changed" if texts[0] != texts[1] and name not in ("label", "file") else "") for text in texts)]
        for name, texts in lines
    ]
    return Table("What was compared; marked where they differ", ("", "base", "candidate"), rows, words=(1, 2))


def _meta(side: Evaluation, *keys: str) -> str:
    for key in keys:
        place: Any = side.own if key.startswith("softprune.") else side.meta
        if (found := place.get(key.removeprefix("softprune."))) is not None:
            return short(str(found), 24)
    return "–"


@dataclass(frozen=True)
class RowPlanes:
    """The figures of one row: planes and marginals; `open` where they are shown at once."""

    name: str
    open: bool
    figures: list[Figure]


def _planes(gate: Gate, base: Evaluation, candidate: Evaluation, brief: bool) -> list[RowPlanes]:
    """Of each row that both sides have; nothing is subtracted of sides that must not be compared."""
    primary = {(row.pack, row.seq_len): row.primary for row in gate.rows}
    if not any(primary.values()):
        # Nothing is primary: the first row that both have stands for it.
        primary |= {key: True for key in [key for key in base.cells if key in candidate.cells][:1]}
    found = []
    for key, cell in base.cells.items():
        shown_at_once = primary.get(key, False)
        if key not in candidate.cells or (brief and not shown_at_once):
            continue
        thresholds = (cell.metrics["x_thr"], cell.metrics["h_thr"])
        sides = [landscape(side, key, name, thresholds) for side, name in ((base, "base"), (candidate, "candidate"))]
        figures = landscapes(sides)
        if gate.verdict != "INVALID":
            figures += [difference(*sides), *([] if brief else marginals(sides))]
        found.append(RowPlanes(f"{cell.pack}@{cell.seq_len}", shown_at_once and gate.verdict != "INVALID", figures))
    return found
