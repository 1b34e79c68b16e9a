"""A sweep's section: its cells with their verdicts, perplexity against experts kept, speed against quality, and every pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from softprune.errors import InputError
from softprune.evaluate.evaluation import Evaluation
from softprune.evaluate.packing import UNION
from softprune.report.documents import Decode, Gate, Sweep, SweepCell
from softprune.report.gate import gate_section
from softprune.report.given import SweepFolder, evaluation_of, gate_of
from softprune.report.numbers import NONE, fixed, number, plural, short, signed_percent
from softprune.report.page import Section, Summary, render
from softprune.report.sweep_charts import Quality, ppl_chart, speed_chart
from softprune.report.table import Cell, Table

_Read = TypeVar("_Read")


@dataclass(frozen=True, eq=False)
class Pair:
    """A cell with what its files hold; `problems` says which could not be read."""

    cell: SweepCell
    base: Evaluation | None
    evaluation: Evaluation | None
    gate: Gate | None
    problems: tuple[str, ...]


def sweep_section(given: SweepFolder, id_: str) -> tuple[Summary, Section]:
    """The section of a sweep; a file of a cell that is missing or broken is named in the cell's place."""
    sweep = given.sweep
    names = dict.fromkeys(name for name in (sweep.base, *(cell.base for cell in sweep.cells)) if name is not None)
    bases = {name: _file(given.folder, name, evaluation_of) for name in names}
    known = {name: base for name, (base, _) in bases.items() if base is not None}
    pairs = [_pair(given.folder, cell, known.get(cell.base or sweep.base or "")) for cell in sweep.cells]
    details = []
    for i, pair in enumerate(pairs):
        body = None
        if pair.gate is not None:
            body = gate_section(pair.gate, pair.base, pair.evaluation, f"{id_}-cell-{i}", pair.cell.title, brief=True)[1].body
        details.append((pair.cell, pair.problems, body))
    quality = _quality(pairs, len(known))
    charts = [] if quality is None else [ppl_chart(sweep.cells, quality), speed_chart(sweep.cells, quality)]
    body = render(
        "sweep.html",
        facts=_facts(sweep, next(iter(known.values()), None)),
        error=sweep.error,
        problems=[problem for _, problems in bases.values() for problem in problems],
        cells=_cells(pairs, known, id_),
        charts=[chart for chart in charts if chart is not None],
        details=details,
        id=id_,
    )
    return Summary("", _sentence(sweep)), Section(id_, f"Sweep: {sweep.model or given.folder.name}", body)


def _quality(pairs: list[Pair], num_bases: int) -> Quality | None:
    """Perplexity of the row that the gates name first, else of the union; over its own base's where data were drawn several times."""
    named = [row.name for pair in pairs if pair.gate is not None for row in pair.gate.rows if row.primary]
    measured = [name for pair in pairs for name in pair.cell.ppl]
    if not measured:
        return None
    row = (named + sorted(measured, key=lambda name: not name.startswith(f"{UNION}@")))[0]
    ppl = [pair.cell.ppl.get(row) for pair in pairs]
    own = [_ppl(pair.base).get(row) for pair in pairs]
    if num_bases < 2:
        return Quality(row, f"PPL, {row}", ppl, next(iter(own), None))
    return Quality(row, f"PPL over its base's, {row}", [a / b if a and b else None for a, b in zip(ppl, own, strict=True)], 1.0)


def _ppl(of: Evaluation | None) -> dict[str, float]:
    return {} if of is None else {f"{cell.pack}@{cell.seq_len}": cell.metrics["ppl"] for cell in of.cells.values()}


def _sentence(sweep: Sweep) -> str:
    verdicts = Counter(cell.verdict or "not judged" for cell in sweep.cells)
    counts = ", ".join(f"{count} {name}" for name, count in verdicts.most_common())
    words = [f"{plural(len(sweep.cells), 'cell')}: {counts}."]
    passing = [cell for cell in sweep.cells if cell.verdict == "PASS"]
    timed = [(cell, cell.decode) for cell in passing if cell.decode is not None]
    # A speed that the interval does not tell from the base's is none to be proud of.
    faster = [(cell, decode) for cell, decode in timed if decode.low is not None and decode.low > 1]
    fewest = min((cell for cell in passing if cell.keep is not None), key=lambda cell: (cell.keep or 0, cell.rel_ppl or 0.0), default=None)
    if fewest is not None:
        words.append(f"Fewest experts that pass: {fewest.title}, PPL {signed_percent(fewest.rel_ppl)}.")
    if faster:
        cell, decode = max(faster, key=lambda one: one[1].over_base)
        words.append(f"Fastest that passes: {cell.title}, {fixed(decode.over_base, 3)} times the base's decode speed.")
    elif timed:
        words.append("No decode speed of those that pass is told from the base's.")
    if not passing:
        words.append("No cell passes.")
    if sweep.error:
        words.append("The sweep did not end well.")
    return " ".join(words)


def _pair(folder: Path, cell: SweepCell, base: Evaluation | None) -> Pair:
    evaluation, missing = _file(folder, cell.evaluation, evaluation_of)
    gate, also = _file(folder, cell.gate, gate_of)
    return Pair(cell, base, evaluation, gate, (*missing, *also))


def _file(folder: Path, name: str | None, read: Callable[[Path], _Read]) -> tuple[_Read | None, list[str]]:
    """A file of the sweep, or why there is none; only what lies in its folder is read, whatever the sweep's file says."""
    if name is None:
        return None, []
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return None, [f"{name} lies outside the sweep's folder, so it was not read."]
    try:
        return read(path), []
    except InputError as error:
        where = f"{name}: {error.field}" if error.field else name
        return None, [f"{where}: found {error.found}; expected {error.expected}."]


def _facts(sweep: Sweep, base: Evaluation | None) -> list[tuple[str, str]]:
    facts = [
        ("Model", sweep.model or "–"),
        ("Weights' fingerprint", short(sweep.fingerprint, 19)),
        ("Engine", sweep.engine or "–"),
        ("Date", sweep.date or "–"),
    ]
    if base is not None:
        tokens = ", ".join(f"{cell.pack}@{cell.seq_len} {cell.tokens:,}" for cell in base.cells.values())
        facts.append(("Completion tokens of a cell", tokens))
    return facts


def _cells(pairs: list[Pair], bases: dict[str, Evaluation], id_: str) -> Table:
    quality = _quality(pairs, 1)
    first = [] if quality is None else [quality.row]
    names = list(dict.fromkeys(first + [name for pair in pairs for name in pair.cell.ppl]))
    columns = [
        "cell", "verdict", "experts kept", *(f"PPL, {name}" for name in names[:1]), "ΔPPL, share", "decode speed over base", "Pareto front",
        *(f"PPL, {name}" for name in names[1:]), "method", "seed",
    ]  # fmt: skip
    rows: list[list[Cell | str]] = []
    for name, base in bases.items():
        ppl = [number(_ppl(base).get(row)) for row in names]
        rows.append(["base" if len(bases) == 1 else name.removesuffix(".json"), "", "all", *ppl[:1], "", "", "", *ppl[1:], "", ""])
    for i, pair in enumerate(pairs):
        cell = pair.cell
        link = render("link.html", target=f"{id_}-cell-{i}", text=cell.title)
        badge = render("badge.html", verdict=cell.verdict) if cell.verdict else NONE
        ppl = [number(cell.ppl.get(name)) for name in names]
        rows.append([
            Cell(link), Cell(badge), _or_none(cell.keep), *ppl[:1], signed_percent(cell.rel_ppl), _speed(cell.decode),
            "on it" if cell.pareto else "", *ppl[1:], _or_none(cell.method), _or_none(cell.seed),
        ])  # fmt: skip
    last = len(columns) - 2
    return Table("Cells; each leads to its pair below", columns, rows, words=(1, last))


def _or_none(value: object) -> str:
    return NONE if value is None else str(value)


def _speed(decode: Decode | None) -> Cell:
    if decode is None:
        return Cell(NONE)
    spread = "" if decode.low is None or decode.high is None else f"{fixed(decode.low, 3)} to {fixed(decode.high, 3)}; "
    return Cell(f"{fixed(decode.over_base, 3)} ×", f"{spread}{number(decode.tok_s)} tokens/s, batch {decode.batch}")
