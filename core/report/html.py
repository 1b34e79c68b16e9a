"""`softprune report`: one HTML file of whatever is given, which needs no network to be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softprune.evaluate import gates
from softprune.evaluate.evaluation import Cell, Evaluation
from softprune.evaluate.pair import compare
from softprune.files import write_whole
from softprune.report.documents import Gate, ReportError, Values, parsed
from softprune.report.evaluation import evaluation_section
from softprune.report.gate import gate_section
from softprune.report.given import KNOWN, Given
from softprune.report.mask import mask_section
from softprune.report.page import Section, Summary, page
from softprune.report.statistics import statistics_section
from softprune.report.sweep import sweep_section


def report(files: Sequence[Path], base: Path | None = None, thresholds: str = gates.NEAR_LOSSLESS) -> str:
    """The page of some files; the same files give the same page.

    Args:
        files: statistics, evaluations, gates' results, sweeps and masks, in any order.
        base: evaluation that the others are compared with; without it, the first of several is.
        thresholds: for pairs whose gate's result is not among the files: a shipped set's name, or a file.

    Raises:
        InputError: a file that cannot be read, is of no known kind, or does not go with another.
    """
    given = Given()
    if base is not None and (kind := given.add(base)) != "evaluation":
        raise ReportError(str(base), "", f"{kind}", "an evaluation, as --base")
    for file in files:
        given.add(file)
    parts = [sweep_section(sweep, f"sweep-{i}") for i, sweep in enumerate(given.sweeps)]
    parts += _evaluations(given, thresholds)
    for i, (name, mask) in enumerate(given.masks):
        parts.append(mask_section(mask, name, f"mask-{i}", given.statistics))
    for i, (name, statistics) in enumerate(given.statistics):
        parts.append(statistics_section(statistics, name, f"statistics-{i}"))
    if not parts:
        raise ReportError("", "", "nothing to show", KNOWN)
    return page(_title(given), [summary for summary, _ in parts], [section for _, section in parts], given.sources)


def _evaluations(given: Given, thresholds: str) -> list[tuple[Summary, Section]]:
    """Sections of pairs, of a lone evaluation, and of results of gates whose evaluations are not given."""
    if len(given.evaluations) < 2:
        lone = [evaluation_section(of, name, f"evaluation-{i}") for i, (name, of) in enumerate(given.evaluations)]
        return [gate_section(gate, None, None, f"pair-{i}", _versus(gate)) for i, (_, gate) in enumerate(given.gates)] + lone
    (_, base), *candidates = given.evaluations
    unused, parts = list(given.gates), []
    for i, (name, candidate) in enumerate(candidates):
        mine = [item for item in unused if _goes_with(item[1], base, candidate)]
        if mine:
            unused.remove(mine[0])
            gate = mine[0][1]
        else:
            gate = parsed(Gate, compare(base, candidate, gates.read(thresholds)).document(), name)
        parts.append(gate_section(gate, base, candidate, f"pair-{i}", _versus(gate)))
    if unused:
        name, gate = unused[0]
        labels = "; ".join(f"{of.label} ({file})" for file, of in given.evaluations)
        stale = any(_by_name(gate, base, candidate) for _, candidate in candidates)
        found = f"{gate.base.label}, {gate.candidate.label}" + (" with other rows or numbers" if stale else "")
        raise ReportError(name, "base, candidate", found, f"two of the evaluations given: {labels}")
    return parts


def _goes_with(gate: Gate, base: Evaluation, candidate: Evaluation) -> bool:
    """Whether a gate compared these two: by label, mask and weights, and by every row's blocks and numbers, which another run changes."""
    if not _by_name(gate, base, candidate):
        return False
    if gate.verdict == "INVALID":
        return not gate.rows
    if {(row.pack, row.seq_len) for row in gate.rows} != base.cells.keys() & candidate.cells.keys():
        return False
    return all(
        _same(values, of.cell(row.pack, row.seq_len)) for row in gate.rows for values, of in ((row.base, base), (row.candidate, candidate))
    )


def _same(values: Values, cell: Cell) -> bool:
    digest = cell.identity["blocks_sha256"]
    if None not in (digest, values.blocks_sha256) and digest != values.blocks_sha256:
        return False
    return (values.tokens, values.ppl, values.mean_prob) == (cell.tokens, cell.metrics["ppl"], cell.metrics["mean_prob"])


def _by_name(gate: Gate, base: Evaluation, candidate: Evaluation) -> bool:
    return all(
        (side.label, side.mask, side.fingerprint) == (of.label, of.own.get("mask"), of.own.get("fingerprint"))
        for side, of in ((gate.base, base), (gate.candidate, candidate))
    )


def _versus(gate: Gate) -> str:
    return f"{gate.candidate.label} against {gate.base.label}"


def write_report(text: str, out: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        ReportError: it cannot be written.
    """
    try:
        write_whole(out, text)
    except OSError as error:
        raise ReportError(str(out), "", error.strerror or str(error), "a place that can be written") from None


def _title(given: Given) -> str:
    if given.sweeps:
        return f"Sweep of {given.sweeps[0].sweep.model or given.sweeps[0].folder.resolve().name}"
    if len(given.evaluations) > 1:
        (_, base), *candidates = given.evaluations
        return f"{', '.join(of.label for _, of in candidates)} against {base.label}"
    if given.gates:
        return _versus(given.gates[0][1])
    return ", ".join([of.label for _, of in given.evaluations] + [name for name, _ in (*given.masks, *given.statistics)])
