"""A gate's result in words."""

from __future__ import annotations

import re

from softprune.report.documents import Check, Gate, Row
from softprune.report.numbers import fixed, number, plural, points, shortened_hashes, signed, signed_percent
from softprune.report.page import Summary

METRICS = {
    "ppl": "ΔPPL",
    "cc_rate": "Δ confident conflicts, own thresholds",
    "cc_rate_base_thr": "Δ confident conflicts, base's thresholds",
    "mean_prob": "Δ mean p",
    "js2d": "JS2D",
}
NATS, PP = "\N{NO-BREAK SPACE}nats", "\N{NO-BREAK SPACE}pp"


def metric(check: Check) -> str:
    """The name of what was checked."""
    return METRICS.get(check.metric, check.metric)


def value(check: Check) -> str:
    """What was found, with its unit."""
    if check.metric.startswith("cc_rate"):
        return points(check.value).replace(" pp", PP)
    return f"{fixed(check.value)}{NATS}" if check.metric == "js2d" else signed(check.value)


def limit(check: Check) -> str:
    """How much it may be, with its unit."""
    if check.metric == "js2d":
        return f"≤\N{NO-BREAK SPACE}{number(check.limit, 3)}{NATS}"
    share = check.metric.startswith("cc_rate")
    return "±\N{NO-BREAK SPACE}" + (f"{number(100 * check.limit, 3)}{PP}" if share else number(check.limit, 3))


def columns(check: Check) -> tuple[str, str, str]:
    """Name, value and limit for a table, where the unit stands with the name: three columns then fit a phone."""
    unit = next((unit for unit in (NATS, PP) if value(check).endswith(unit)), "")
    name = metric(check) + (f", {unit.strip()}" if unit else "")
    return name, value(check).removesuffix(unit), limit(check).removesuffix(unit)


def summary(gate: Gate) -> Summary:
    """The verdict and why: what fails first, what is missing, what does not fit, or how far it is from failing."""
    sides = f"{gate.candidate.label} against {gate.base.label}"
    if gate.verdict in ("INVALID", "INCOMPLETE"):
        lead = "cannot be compared" if gate.verdict == "INVALID" else "cannot be judged yet"
        return Summary(gate.verdict, f"{sides} {lead}: {_reasons(gate.problems)}")
    checked = [(row, check) for row in gate.rows if row.judged for check in row.checks]
    failed = [(row, check) for row, check in checked if check.passed is False]
    head = _perplexity(gate.primary)
    if gate.verdict == "PASS":
        closest = max(checked, key=lambda pair: _used(pair[1]), default=None)
        near = "" if closest is None else f" Closest to its limit: {_said(*closest)}."
        return Summary("PASS", f"{sides}: all {plural(len(checked), 'check')} of {gate.gates.name} hold. {head}{near}")
    shown = "; ".join(_said(*pair) for pair in sorted(failed, key=lambda pair: -_used(pair[1]))[:2])
    rest = f"; and {len(failed) - 2} more" if len(failed) > 2 else ""
    return Summary("FAIL", f"{sides}: {len(failed)} of {plural(len(checked), 'check')} of {gate.gates.name} fail. {head} {shown}{rest}.")


def _reasons(problems: list[str]) -> str:
    """What differs, by the names of the fields, which stand before the colon; else the first problem."""
    fields = [re.match(r"[^:]*\.(\w+): ", problem) for problem in problems]
    names = list(dict.fromkeys(field[1] for field in fields if field is not None))
    if names and all(fields):
        return f"they differ in {', '.join(names)}. Every place is listed below."
    more = f" (and {plural(len(problems) - 1, 'more reason')})" if len(problems) > 1 else ""
    return f"{shortened_hashes(problems[0]) if problems else 'no reason given'}{more}"


def _perplexity(row: Row | None) -> str:
    if row is None:
        return ""
    change = f"{signed(row.delta.ppl.value, 3)}, {signed_percent(row.delta.rel_ppl.value)}"
    return f"PPL on {row.name}: {number(row.base.ppl)} → {number(row.candidate.ppl)} ({change})."


def _said(row: Row, check: Check) -> str:
    return f"{metric(check)} {value(check)} on {row.name} (limit {limit(check)})"


def _used(check: Check) -> float:
    """How much of the limit is used; above 1 it fails."""
    found = abs(check.value or 0.0)
    return found / check.limit if check.limit else (0.0 if found == 0 else float("inf"))
