"""Layer-by-expert matrices as pictures: one row a layer, one column an expert, a bar of colours below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from softprune.report import svg
from softprune.report.image import data_uri, sequential, shades
from softprune.report.numbers import number

WIDTH, LEFT, RIGHT, TOP = 400.0, 34.0, 8.0, 8.0
KEPT = np.array([[0, 0, 0, 0], [46, 140, 120, 255]], np.uint8)
"""A pruned expert and a kept one, RGBA."""
TITLED_CELLS = 1024
"""Up to so many cells each has its value under the mouse; of larger models each layer has its extremes, for the sake of the size."""


def heatmap(values: NDArray[Any], label: str, unit: str, pruned: Sequence[Sequence[int]] | None = None, titles: bool = True) -> Markup:
    """A matrix.

    Args:
        values: [layers, experts]; where a value is not finite the ground shows.
        label: what it shows, for those who cannot see it.
        unit: of the bar of colours.
        pruned: of each layer, ids that are crossed out.
        titles: values are shown under the mouse.
    """
    layers, experts = values.shape
    width, height = WIDTH - LEFT - RIGHT, _height(layers)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    # From 0 on, if that leaves the values their contrast.
    low = 0.0 if 0 <= low < high / 2 else low
    w, h = width / experts, height / layers
    image = image_of(data_uri(shades(values, low, high), sequential()), LEFT, TOP, width, height)
    marks = [image, _frame(height), _ticks(layers, experts, w, h, height)]
    if titles:
        marks.append(_titles(values, w, h))
    if pruned is not None:
        marks.append(_crosses(pruned, w, h))
    marks.append(bar("sequential", TOP + height + 38, (number(low, 3), unit, number(high, 3))))
    return svg.picture(WIDTH, TOP + height + 62, label, *marks)


def image_of(uri: str, x: float, y: float, width: float, height: float) -> Markup:
    """An image whose pixels stay sharp."""
    return svg.element("image", href=uri, x=x, y=y, width=width, height=height, preserveAspectRatio="none", class_="pixels")


def bar(gradient: str, y: float, words: tuple[str, str, str], left: float = LEFT, right: float = WIDTH - RIGHT) -> Markup:
    """A bar of colours with words at its left end, middle and right end."""
    places = ((left, "start"), ((left + right) / 2, "middle"), (right, "end"))
    texts = [svg.element("text", word, x=x, y=y + 20, text_anchor=at, class_="tick") for (x, at), word in zip(places, words, strict=True)]
    return svg.element("rect", x=left, y=y, width=right - left, height=8, fill=f"url(#bar-{gradient})", class_="frame") + svg.joined(texts)


def _frame(height: float) -> Markup:
    return svg.element("rect", x=LEFT, y=TOP, width=WIDTH - LEFT - RIGHT, height=height, class_="frame", fill="none")


def _ticks(layers: int, experts: int, w: float, h: float, height: float) -> Markup:
    marks = []
    for expert in range(0, experts, _every(experts, 8)):
        x = LEFT + (expert + 0.5) * w
        marks.append(svg.element("text", str(expert), x=x, y=TOP + height + 13, text_anchor="middle", class_="tick"))
    for layer in range(0, layers, _every(layers, max(1, int(height / 24)))):
        marks.append(svg.element("text", str(layer), x=LEFT - 5, y=TOP + (layer + 0.5) * h + 3.5, text_anchor="end", class_="tick"))
    marks.append(svg.element("text", "expert", x=(LEFT + WIDTH - RIGHT) / 2, y=TOP + height + 28, text_anchor="middle", class_="axis"))
    turned = f"translate(9 {TOP + height / 2:g}) rotate(-90)"
    marks.append(svg.element("text", "MoE layer", transform=turned, text_anchor="middle", class_="axis"))
    return svg.joined(marks)


def _every(count: int, most: int) -> int:
    """A round step that gives at most so many ticks."""
    return next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 100_000) if count <= step * most)


def _titles(values: NDArray[Any], w: float, h: float) -> Markup:
    """Transparent fields that carry the texts under the mouse."""
    fields = []
    for layer, row in enumerate(values):
        y = TOP + layer * h
        if values.size <= TITLED_CELLS:
            for expert, value in enumerate(row):
                title = svg.element("title", f"layer {layer}, expert {expert}: {number(float(value), 3)}")
                fields.append(svg.element("rect", title, x=LEFT + expert * w, y=y, width=w, height=h))
        elif np.isfinite(row).any():
            most, least = int(np.nanargmax(row)), int(np.nanargmin(row))
            text = f"layer {layer}: most expert {most}, {number(float(row[most]), 3)}; least expert {least}, {number(float(row[least]), 3)}"
            fields.append(svg.element("rect", svg.element("title", text), x=LEFT, y=y, width=WIDTH - LEFT - RIGHT, height=h))
    return svg.element("g", *fields, class_="fields")


def _crosses(pruned: Sequence[Sequence[int]], w: float, h: float) -> Markup:
    """One path through all pruned cells, corner to corner."""
    data = "".join(
        f"M{LEFT + expert * w:.1f} {TOP + (layer + 1) * h:.1f}l{w:.1f} {-h:.1f}" for layer, ids in enumerate(pruned) for expert in ids
    )
    return svg.element("path", d=data, class_="cross") if data else Markup("")


def keep_picture(keep: Sequence[Sequence[int] | None], experts: int, label: str) -> Markup:
    """A mask: kept experts filled, pruned ones empty."""
    layers = len(keep)
    width, height = WIDTH - LEFT - RIGHT, _height(layers)
    w, h = width / experts, height / layers
    kept = np.zeros((layers, experts), np.uint8)
    for layer, ids in enumerate(keep):
        kept[layer, slice(None) if ids is None else list(ids)] = 1
    marks = [image_of(data_uri(kept, KEPT), LEFT, TOP, width, height), _frame(height), _ticks(layers, experts, w, h, height)]
    return svg.picture(WIDTH, TOP + height + 34, label, *marks)


def _height(layers: int) -> float:
    return float(np.clip(layers * 9, 72, 330))
