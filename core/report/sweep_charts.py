"""A sweep's two charts: perplexity against experts kept, and decode speed against perplexity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from markupsafe import Markup

from softprune.report import svg
from softprune.report.chart import Axis, Frame
from softprune.report.documents import SweepCell
from softprune.report.numbers import fixed, number
from softprune.report.planes import Figure

COLOURS = 8
"""Of the style sheet: c0 to c7."""
MOST_TICKS = 10
"""Numbers kept that all have a tick."""


@dataclass(frozen=True)
class Quality:
    """What the charts' y shows.

    Attributes:
        row: pack and block length, e.g. "UNION@1024".
        label: of the axis.
        values: of each cell; None where it has none.
        level: the base's.
    """

    row: str
    label: str
    values: Sequence[float | None]
    level: float | None


def ppl_chart(cells: Sequence[SweepCell], quality: Quality) -> Figure | None:
    """Perplexity against experts kept: a line through each method's geometric means, a point for each seed and a band where there are
    several; None without numbers kept."""
    colours, level = groups(cells), quality.level
    found = [(cell, cell.keep, y) for cell, y in zip(cells, quality.values, strict=True) if cell.keep is not None and y is not None]
    if not found:
        return None
    keeps = tuple(float(keep) for keep in sorted({keep for _, keep, _ in found}))
    across = Axis.around("experts kept a layer", keeps, False, keeps if len(keeps) <= MOST_TICKS else ())
    frame = Frame(across, Axis.around(quality.label, [y for _, _, y in found] + ([level] if level else [])))
    marks = [frame.axes()]
    if level:
        marks.append(frame.across(level, "level", f"base, {number(level)}"))
    for name, colour in colours.items():
        by_keep: dict[int, list[float]] = defaultdict(list)
        for cell, keep, y in found:
            if _group(cell, cells) == name:
                by_keep[keep].append(y)
        spread = [(float(keep), min(values), max(values)) for keep, values in sorted(by_keep.items())]
        if any(low < high for _, low, high in spread):
            marks.append(frame.band(spread, colour))
        if by_keep:
            marks.append(frame.line([(float(keep), geometric_mean(values)) for keep, values in sorted(by_keep.items())], colour))
    marks += [_dot(frame, float(keep), y, cell, colours[_group(cell, cells)], quality) for cell, keep, y in found]
    words = f"{quality.label}, against experts kept, by method" + ("; filled points pass" if any(cell.verdict for cell in cells) else "")
    return Figure(words, frame.drawn(words, *marks), [*colours.items(), *([("base", "level")] if level else [])])


def speed_chart(cells: Sequence[SweepCell], quality: Quality) -> Figure | None:
    """Perplexity against decode speed over the base's, with the Pareto front; None where no speed was measured."""
    colours, level = groups(cells), quality.level
    found = [(cell, cell.decode, y) for cell, y in zip(cells, quality.values, strict=True) if cell.decode is not None and y is not None]
    if not found:
        return None
    speeds = [value for _, decode, _ in found for value in (decode.low, decode.over_base, decode.high) if value is not None]
    ys = [y for _, _, y in found] + ([level] if level else [])
    frame = Frame(Axis.around("decode speed over the base's", [*speeds, 1.0], False), Axis.around(quality.label, ys))
    marks = [frame.axes()]
    front = sorted((decode.over_base, y) for cell, decode, y in found if cell.pareto)
    if len(front) > 1:
        marks.append(frame.line(front, "front"))
    if level:
        px, py = frame.at(1.0, level)
        marks.append(frame.dot(1.0, level, "base", f"base: 1 ×, {quality.label} {number(level)}", 5.0))
        marks.append(svg.element("text", "base", x=px + 8, y=py + 4, class_="tick"))
    for cell, decode, y in found:
        colour = colours[_group(cell, cells)]
        if decode.low is not None and decode.high is not None:
            marks.append(frame.line([(decode.low, y), (decode.high, y)], f"{colour} whisker"))
        marks.append(_dot(frame, decode.over_base, y, cell, colour, quality))
    marks += _names(frame, [(decode.over_base, y, cell.title) for cell, decode, y in found if cell.pareto])
    words = f"{quality.label}, against decode speed; right and down is better" + (
        ", the line is the Pareto front" if len(front) > 1 else ""
    )
    return Figure(words, frame.drawn(words, *marks), [*colours.items(), *([("Pareto front", "front")] if len(front) > 1 else [])])


def groups(cells: Sequence[SweepCell]) -> dict[str, str]:
    """Classes of colours by what makes a line, in the order of the cells; more lines than colours share them."""
    return {name: f"c{i % COLOURS}" for i, name in enumerate(dict.fromkeys(_group(cell, cells) for cell in cells))}


def _group(cell: SweepCell, cells: Sequence[SweepCell]) -> str:
    """Its method, and its experts per token where they differ."""
    name = cell.method or ("unmasked" if cell.mask is None else "given masks")
    return name if len({other.top_k for other in cells}) < 2 else f"{name}, top_k {cell.top_k}"


def _dot(frame: Frame, x: float, y: float, cell: SweepCell, colour: str, quality: Quality) -> Markup:
    speed = "" if cell.decode is None else f", {fixed(cell.decode.over_base, 3)} × the base's decode speed"
    title = f"{cell.title}: {quality.label} {number(y)}{speed}, {cell.verdict or 'not judged'}"
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
