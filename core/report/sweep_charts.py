"""A sweep's two charts: perplexity against experts kept, and decode speed against perplexity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import geometric_mean

from markupsafe import Markup

from softprune.evaluate.evaluation import Evaluation
from softprune.report import svg
from softprune.report.chart import Axis, Frame
from softprune.report.documents import SweepCell
from softprune.report.numbers import fixed, number
from softprune.report.planes import Figure

COLOURS = 8
"""Of the style sheet: c0 to c7."""
MOST_TICKS = 10
"""Numbers kept that all have a tick."""


def ppl_chart(cells: Sequence[SweepCell], base: Evaluation | None) -> Figure | None:
    """Perplexity of the first row against experts kept: a line through each method's geometric means, a point for each seed and a band
    where there are several; None without numbers kept."""
    name, colours = _row(cells), methods(cells)
    found = [(cell, cell.keep, cell.ppl[name]) for cell in cells if cell.keep is not None and name in cell.ppl]
    if not found:
        return None
    level = _base_ppl(base, name)
    ppls = [ppl for _, _, ppl in found] + ([level] if level else [])
    keeps = tuple(float(keep) for keep in sorted({keep for _, keep, _ in found}))
    across = Axis.around("experts kept a layer", keeps, False, keeps if len(keeps) <= MOST_TICKS else ())
    frame = Frame(across, Axis.around(f"PPL, {name}", ppls))
    marks = [frame.axes()]
    if level:
        marks.append(frame.across(level, "level", f"base, {number(level)}"))
    for method, colour in colours.items():
        by_keep: dict[int, list[float]] = defaultdict(list)
        for cell, keep, ppl in found:
            if cell.method == method:
                by_keep[keep].append(ppl)
        spread = [(float(keep), min(values), max(values)) for keep, values in sorted(by_keep.items())]
        if any(low < high for _, low, high in spread):
            marks.append(frame.band(spread, colour))
        marks.append(frame.line([(float(keep), geometric_mean(values)) for keep, values in sorted(by_keep.items())], colour))
    marks += [_dot(frame, float(keep), ppl, cell, colours[cell.method], name) for cell, keep, ppl in found]
    words = f"PPL on {name} against experts kept, by method" + ("; filled points pass" if any(cell.verdict for cell in cells) else "")
    return Figure(words, frame.drawn(words, *marks), _key(colours, level is not None))


def speed_chart(cells: Sequence[SweepCell], base: Evaluation | None) -> Figure | None:
    """Perplexity against decode speed over the base's, with the Pareto front; None where no speed was measured."""
    name, colours = _row(cells), methods(cells)
    found = [(cell, cell.decode, cell.ppl[name]) for cell in cells if cell.decode is not None and name in cell.ppl]
    if not found:
        return None
    level = _base_ppl(base, name)
    speeds = [value for _, decode, _ in found for value in (decode.low, decode.over_base, decode.high) if value is not None]
    ppls = [ppl for _, _, ppl in found] + ([level] if level else [])
    frame = Frame(Axis.around("decode speed over the base's", [*speeds, 1.0], False), Axis.around(f"PPL, {name}", ppls))
    marks = [frame.axes()]
    front = sorted((decode.over_base, ppl) for cell, decode, ppl in found if cell.pareto)
    if len(front) > 1:
        marks.append(frame.line(front, "front"))
    if level:
        x, y = frame.at(1.0, level)
        marks.append(frame.dot(1.0, level, "base", f"base: 1 ×, PPL {number(level)}", 5.0))
        marks.append(svg.element("text", "base", x=x + 8, y=y + 4, class_="tick"))
    for cell, decode, ppl in found:
        if decode.low is not None and decode.high is not None:
            marks.append(frame.line([(decode.low, ppl), (decode.high, ppl)], f"{colours[cell.method]} whisker"))
        marks.append(_dot(frame, decode.over_base, ppl, cell, colours[cell.method], name))
    marks += _names(frame, [(decode.over_base, ppl, cell.label) for cell, decode, ppl in found if cell.pareto])
    words = f"PPL on {name} against decode speed; right and down is better, the line is the Pareto front"
    return Figure(words, frame.drawn(words, *marks), [*_key(colours, False), ("Pareto front", "front")])


def methods(cells: Sequence[SweepCell]) -> dict[str | None, str]:
    """Classes of colours by method, in the order of the cells; more methods than colours share them."""
    return {method: f"c{i % COLOURS}" for i, method in enumerate(dict.fromkeys(cell.method for cell in cells))}


def _row(cells: Sequence[SweepCell]) -> str:
    """The row whose perplexity is drawn: the first that a cell has."""
    return next((name for cell in cells for name in cell.ppl), "")


def _base_ppl(base: Evaluation | None, name: str) -> float | None:
    if base is None:
        return None
    return next((cell.metrics["ppl"] for cell in base.cells.values() if f"{cell.pack}@{cell.seq_len}" == name), None)


def _dot(frame: Frame, x: float, y: float, cell: SweepCell, colour: str, name: str) -> Markup:
    speed = "" if cell.decode is None else f", {fixed(cell.decode.over_base, 3)} × the base's decode speed"
    title = f"{cell.label}: PPL {number(cell.ppl[name])} on {name}{speed}, {cell.verdict or 'not judged'}"
    return frame.dot(x, y, colour if cell.verdict == "PASS" else f"{colour} hollow", title)


def _names(frame: Frame, points: list[tuple[float, float, str]]) -> list[Markup]:
    """Names below points; one that would cover another is left out."""
    taken: list[tuple[float, float]] = []
    marks = []
    for x, y, text in sorted(points, reverse=True):
        px, py = frame.at(x, y)
        if any(abs(py - other_y) < 11 and abs(px - other_x) < 90 for other_x, other_y in taken):
            continue
        taken.append((px, py))
        shown = text if len(text) <= 20 else text[:19] + "…"
        anchor = "end" if px > frame.width - 60 else "middle"
        marks.append(svg.element("text", shown, x=px, y=py + 15, text_anchor=anchor, class_="tick"))
    return marks


def _key(colours: dict[str | None, str], base: bool) -> list[tuple[str, str]]:
    return [(method or "given masks", colour) for method, colour in colours.items()] + ([("base", "level")] if base else [])
