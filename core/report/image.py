"""Matrices as small PNGs in the page itself, in colours that read on light and on dark ground."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from softprune.report import svg

LEVELS = 64
"""Shades of a palette: more cannot be told apart, and fewer make smaller files."""
LESS, MORE = (38, 133, 224), (226, 106, 20)
"""Of a difference: blue where the candidate has less, orange where it has more."""

FAINTEST = 0.2
"""Opacity of the least difference that is drawn."""


@cache
def sequential() -> NDArray[np.uint8]:
    """Viridis less its darkest part, which would vanish on dark ground, as RGBA [LEVELS + 1, 4]; 0 is transparent."""
    import matplotlib as mpl

    colours = mpl.colormaps["viridis"](np.linspace(0.15, 1.0, LEVELS), bytes=True)
    return np.concatenate([np.zeros((1, 4), np.uint8), colours])


@cache
def diverging() -> NDArray[np.uint8]:
    """Two hues whose opacity grows with the difference, as RGBA [2 * LEVELS + 1, 4]; the middle is transparent."""
    palette = np.zeros((2 * LEVELS + 1, 4), np.uint8)
    for i in range(2 * LEVELS + 1):
        palette[i] = (*(LESS if i < LEVELS else MORE), round(255 * (FAINTEST + (1 - FAINTEST) * abs(i - LEVELS) / LEVELS)))
    palette[LEVELS, 3] = 0
    return palette


def shades(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Indices into `sequential` of values from `low` to `high`; 0 where a value is not finite."""
    span = high - low or 1.0
    part = np.clip((np.where(np.isfinite(values), values, low) - low) / span, 0, 1)
    return np.where(np.isfinite(values), 1 + np.rint(part * (LEVELS - 1)), 0).astype(np.uint8)


def signed_shades(values: NDArray[Any], largest: float) -> NDArray[np.uint8]:
    """Indices into `diverging` of values from -largest to largest."""
    return np.rint(LEVELS + LEVELS * np.clip(values / (largest or 1.0), -1, 1)).astype(np.uint8)


def data_uri(indices: NDArray[np.uint8], palette: NDArray[np.uint8]) -> str:
    """A PNG [height, width] as a data URI; the same matrix gives the same text."""
    picture = Image.fromarray(np.ascontiguousarray(indices))
    picture.putpalette(palette.tobytes(), "RGBA")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gradients() -> Markup:
    """Definitions of the colour bars, once in a page."""
    bars = []
    for name, palette in (("sequential", sequential()[1:]), ("diverging", diverging())):
        chosen = palette[np.rint(np.linspace(0, len(palette) - 1, 17)).astype(int)]
        stops = [
            svg.element("stop", offset=f"{i / 16:.4g}", stop_color=f"rgb({r},{g},{b})", stop_opacity=f"{a / 255:.3g}")
            for i, (r, g, b, a) in enumerate(chosen.tolist())
        ]
        bars.append(svg.element("linearGradient", *stops, id=f"bar-{name}"))
    return svg.element("svg", svg.element("defs", *bars), width=0, height=0, aria_hidden="true", class_="defs")
