"""A chart's frame: axes with ticks, and where a value lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from softprune.report import svg
from softprune.report.numbers import number

LOG_FROM = 2.0
"""Largest over smallest value from which an axis of positive values is logarithmic."""


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, with its unit.
        low, high: its ends.
        log: logarithmic.
        at: where ticks stand; () chooses round values.
    """

    label: str
    low: float
    high: float
    log: bool = False
    at: tuple[float, ...] = ()

    @classmethod
    def around(cls, label: str, values: Iterable[float], log: bool | None = None, at: tuple[float, ...] = ()) -> Axis:
        """An axis with a margin around values; logarithmic, unless said, if they are positive and far apart."""
        found = [value for value in values if math.isfinite(value)]
        low, high = min(found), max(found)
        if log is None:
            log = low > 0 and high / low >= LOG_FROM
        if log:
            margin = (high / low) ** 0.06 if high > low else 1.2
            return cls(label, low / margin, high * margin, True, at)
        margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(label, low - margin, high + margin, False, at)

    def part(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @cached_property
    def ticks(self) -> list[float]:
        """Round values within the axis, or those that were given."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        if self.at:
            return list(self.at)
        if self.log:
            for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
                ticks = self._within(LogLocator(subs=subs).tick_values(self.low, self.high))
                if len(ticks) >= 4:
                    return ticks
        return self._within(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(self.low, self.high))

    def _within(self, values: Iterable[float]) -> list[float]:
        slack = 1e-9 * (self.high - self.low)
        return [float(value) for value in values if self.low - slack <= value <= self.high + slack]


@dataclass(frozen=True)
class Frame:
    """A chart's axes, and the place that its marks lie in. One unit is about a pixel of a phone's screen.

    Attributes:
        x, y: axes.
        width, height: of the whole.
        right, top, bottom: margins.
    """

    x: Axis
    y: Axis
    width: float = 400.0
    height: float = 260.0
    right: float = 12.0
    top: float = 10.0
    bottom: float = 40.0

    @cached_property
    def left(self) -> float:
        """Left margin: room for the longest tick of y, and the axis' label."""
        return 24.0 + 5.6 * max(len(_label(tick)) for tick in self.y.ticks)

    @property
    def inner(self) -> tuple[float, float]:
        """Width and height between the margins."""
        return self.width - self.left - self.right, self.height - self.top - self.bottom

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The point of two values."""
        width, height = self.inner
        return self.left + width * self.x.part(x), self.top + height * (1 - self.y.part(y))

    def axes(self, grid: bool = True) -> Markup:
        """Grid, ticks and labels."""
        (x0, y0), (x1, y1) = (self.left, self.height - self.bottom), (self.width - self.right, self.top)
        marks: list[Markup] = []
        for tick in self.x.ticks:
            x = self.at(tick, self._some(self.y))[0]
            marks += [svg.element("line", x1=x, x2=x, y1=y0, y2=y1 if grid else y0 + 4, class_="grid")]
            marks += [svg.element("text", _label(tick), x=x, y=y0 + 15, class_="tick", text_anchor="middle")]
        for tick in self.y.ticks:
            y = self.at(self._some(self.x), tick)[1]
            marks += [svg.element("line", x1=x0, x2=x1 if grid else x0 - 4, y1=y, y2=y, class_="grid")]
            marks += [svg.element("text", _label(tick), x=x0 - 6, y=y + 3.5, class_="tick", text_anchor="end")]
        marks.append(svg.element("text", self.x.label, x=(x0 + x1) / 2, y=self.height - 8, class_="axis", text_anchor="middle"))
        turned = f"translate(11 {(y0 + y1) / 2:g}) rotate(-90)"
        marks.append(svg.element("text", self.y.label, transform=turned, class_="axis", text_anchor="middle"))
        return svg.joined(marks)

    def line(self, points: Iterable[tuple[float, float]], class_: str) -> Markup:
        """A line through values."""
        return svg.path([self.at(x, y) for x, y in points], class_=f"line {class_}")

    def band(self, rows: Sequence[tuple[float, float, float]], class_: str) -> Markup:
        """The area between (x, low, high)."""
        edge = [self.at(x, high) for x, _, high in rows] + [self.at(x, low) for x, low, _ in reversed(rows)]
        return svg.path(edge, closed=True, class_=f"band {class_}")

    def across(self, y: float, class_: str, text: str) -> Markup:
        """A level, and its name above its left end."""
        (x0, height), x1 = self.at(self.x.low, y), self.width - self.right
        name = svg.element("text", text, x=x0 + 4, y=height - 4, class_="tick")
        return svg.element("line", x1=x0, x2=x1, y1=height, y2=height, class_=f"line {class_}") + name

    def dot(self, x: float, y: float, class_: str, title: str, radius: float = 4.0) -> Markup:
        """A point that shows a text under the mouse."""
        cx, cy = self.at(x, y)
        return svg.titled(svg.element("circle", cx=cx, cy=cy, r=radius, class_=f"dot {class_}"), title)

    def drawn(self, label: str, *marks: Markup) -> Markup:
        """The chart; `label` says in words what it shows."""
        return svg.picture(self.width, self.height, label, *marks)

    @staticmethod
    def _some(axis: Axis) -> float:
        return axis.low


def steps(edges: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """A histogram's outline: two points a bin, less those that change nothing."""
    points: list[tuple[float, float]] = []
    for i, value in enumerate(values):
        for point in ((edges[i], value), (edges[i + 1], value)):
            if len(points) > 1 and points[-1][1] == points[-2][1] == point[1]:
                points.pop()
            points.append(point)
    return points


def _label(tick: float) -> str:
    if tick == 0:
        return "0"
    if abs(tick) < 1e-3:
        exponent = math.floor(math.log10(abs(tick)) + 1e-9)
        return f"{tick / 10**exponent:g}e{exponent}".replace("-", "−")
    return number(tick, 4) if abs(tick) >= 1e4 else f"{round(tick, 6):g}".replace("-", "−")
