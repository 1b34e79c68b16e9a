"""The (p, H) planes of an evaluation: base and candidate in one scale of colours, what the candidate has more and less of, and both
marginals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from softprune.report import svg
from softprune.report.chart import Axis, Frame, steps
from softprune.report.heatmap import bar, image_of
from softprune.report.image import data_uri, diverging, sequential, shades, signed_shades
from softprune.report.numbers import number, percent

WIDTH, HEIGHT, BOTTOM = 320.0, 300.0, 68.0
P_LABELS = {"linear": "p of the reference token", "log": "log10 p of the reference token"}
H_LABEL = "H of the top tokens, normalised"


@dataclass(frozen=True, eq=False)
class Landscape:
    """One plane to draw.

    Attributes:
        title: whose it is.
        counts: int64 [xbins, ybins].
        x_edges, y_edges: edges of the bins, [xbins + 1] and [ybins + 1].
        x_label, y_label: what the axes show.
        thresholds: x and H below which a token is a confident conflict; None draws no lines.
    """

    title: str
    counts: NDArray[np.int64]
    x_edges: NDArray[np.float64]
    y_edges: NDArray[np.float64]
    x_label: str = P_LABELS["linear"]
    y_label: str = H_LABEL
    thresholds: tuple[float, float] | None = None

    @property
    def share(self) -> NDArray[np.float64]:
        """Share of the tokens in each cell."""
        return np.asarray(self.counts / max(1, self.counts.sum()), np.float64)

    @property
    def words(self) -> str:
        """What the plane shows, in words."""
        x, y = (edges[:-1] + np.diff(edges) / 2 for edges in (self.x_edges, self.y_edges))
        i, j = np.unravel_index(int(self.counts.argmax()), self.counts.shape)
        mean_x, mean_y = float(self.share.sum(1) @ x), float(self.share.sum(0) @ y)
        name = self.x_label.split(" of ")[0]
        return (
            f"{self.title}: plane of {int(self.counts.sum()):,} tokens, mean {name} {mean_x:.3f}, mean H {mean_y:.3f}; "
            f"fullest cell at {name} {x[i]:.3f}, H {y[j]:.3f} with {percent(float(self.share[i, j]))} of them"
        )


@dataclass(frozen=True)
class Figure:
    """A drawing, its caption, and what its lines stand for: names and classes of the style sheet."""

    caption: str
    drawing: Markup
    key: Sequence[tuple[str, str]] = ()


def landscapes(shown: list[Landscape]) -> list[Figure]:
    """One figure for each plane, all in one scale: the logarithm of the share of tokens in a cell; empty cells are left blank."""
    filled = np.concatenate([land.share[land.share > 0] for land in shown])
    low, high = (float(value) for value in (np.log10(filled.min()), np.log10(filled.max())))
    figures = []
    for land in shown:
        logarithm = np.log10(land.share, where=land.share > 0, out=np.full(land.share.shape, np.nan))
        words = (percent_power(low), "share of tokens in a cell", percent_power(high))
        drawing = _drawn(land, data_uri(_upright(shades(logarithm, low, high)), sequential()), land.words, "sequential", words)
        figures.append(Figure(land.title, drawing))
    return figures


def difference(base: Landscape, candidate: Landscape) -> Figure:
    """Where the candidate has more tokens and where fewer; opacity grows with the logarithm of the difference.

    The caption has the total variation, half of the sum of all differences: at least so many tokens lie in other cells.
    """
    change = candidate.share - base.share
    tokens = min(int(base.counts.sum()), int(candidate.counts.sum()))
    size = np.log1p(np.abs(change) * tokens)
    largest, moved = float(size.max()), float(np.abs(change).sum() / 2)
    words = f"{candidate.title} less {base.title}: total variation {percent(moved)}"
    uri = data_uri(_upright(signed_shades(np.sign(change) * size, largest)), diverging())
    ends = tuple(number(sign * float(np.expm1(largest)) / tokens * 100, 2) + " %" for sign in (-1, 1))
    title = f"difference, total variation {percent(moved)}"
    return Figure(title, _drawn(base, uri, words, "diverging", (ends[0], "candidate less base", f"+{ends[1]}")))


def marginals(shown: list[Landscape]) -> list[Figure]:
    """Both distributions, of p and of H, base and candidate on one another."""
    figures = []
    first = shown[0]
    for axis, edges, name in ((1, first.x_edges, first.x_label), (0, first.y_edges, first.y_label)):
        rows = [land.share.sum(axis) for land in shown]
        smallest = min(float(row[row > 0].min()) for row in rows)
        frame = Frame(
            Axis(name, float(edges[0]), float(edges[-1])),
            Axis("share of tokens in a bin", smallest / 1.5, max(float(row.max()) for row in rows) * 1.5, log=True),
            height=200.0,
        )
        lines = [frame.line(steps(edges.tolist(), np.maximum(row, smallest / 1.5).tolist()), f"c{i} thin") for i, row in enumerate(rows)]
        words = f"Distribution of {name}: {' and '.join(land.title for land in shown)}"
        key = [(land.title, f"c{i}") for i, land in enumerate(shown)] if len(shown) > 1 else []
        figures.append(Figure(name, frame.drawn(words, frame.axes(), *lines), key))
    return figures


def percent_power(exponent: float) -> str:
    """A power of ten as a percentage, two digits."""
    return f"{number(100 * 10**exponent, 2)} %"


def _upright(indices: NDArray[Any]) -> NDArray[np.uint8]:
    """From [x, H] to rows of a picture, whose first is the largest H."""
    return np.ascontiguousarray(indices.T[::-1])


def _ends(edges: NDArray[np.float64]) -> tuple[float, float]:
    return float(edges[0]), float(edges[-1])


def _drawn(land: Landscape, uri: str, words: str, gradient: str, ends: tuple[str, str, str]) -> Markup:
    x_axis, y_axis = Axis(land.x_label, *_ends(land.x_edges)), Axis(land.y_label, *_ends(land.y_edges))
    frame = Frame(x_axis, y_axis, WIDTH, HEIGHT, right=10.0, bottom=BOTTOM)
    # The axes' label stands above the bar, not at the drawing's foot.
    (x0, y1), (width, height) = frame.at(x_axis.low, y_axis.high), frame.inner
    marks = [
        replace(frame, height=HEIGHT - 30, bottom=BOTTOM - 30).axes(grid=False),
        svg.element("rect", x=x0, y=y1, width=width, height=height, class_="ground"),
        image_of(uri, x0, y1, width, height),
        svg.element("rect", x=x0, y=y1, width=width, height=height, class_="frame", fill="none"),
    ]
    if land.thresholds is not None:
        x, y = frame.at(*land.thresholds)
        marks.append(svg.path([(x, y1), (x, y1 + height)], class_="threshold"))
        marks.append(svg.path([(x0, y), (x0 + width, y)], class_="threshold"))
    marks.append(bar(gradient, HEIGHT - 26, ends, x0, x0 + width))
    return svg.picture(WIDTH, HEIGHT, words, *marks)
