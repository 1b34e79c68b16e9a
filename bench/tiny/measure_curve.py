"""The training curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from softprune.errors import InputError

_NUMBERS = ("step", "tokens", "seconds", "train_loss")


def read_curve(path: Path) -> list[dict[str, Any]]:
    """What training wrote: a list of {"step", "tokens", "seconds", "train_loss", "heldout": {pack: perplexity}}.

    Raises:
        InputError: no such file, or something else in it.
    """
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(str(path), "", error.strerror or str(error), "the curve that training writes") from None
    except ValueError as error:
        raise InputError(str(path), "", f"no JSON ({error})", "the curve that training writes") from None
    if not isinstance(points, list) or not points:
        raise InputError(str(path), "", type(points).__name__, "a list with at least one point")
    for i, point in enumerate(points):
        for name in _NUMBERS:
            if not isinstance(point, dict) or not isinstance(point.get(name), int | float):
                raise InputError(str(path), f"[{i}].{name}", repr(point)[:60], "a number")
    return points


def plot_curve(points: list[dict[str, Any]], ngram: dict[str, float], out: Path) -> None:
    """Write an SVG: training loss on the left, held-out perplexity of each pack on the right; same points, same bytes.

    Args:
        points: from `read_curve`.
        ngram: the n-gram model's perplexity of each pack, drawn as dashed lines; {} draws none.
        out: the file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "softprune"
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([point["tokens"] / 1e6 for point in points], [point["train_loss"] for point in points], linewidth=1, color="#4477aa")
    left.set(xlabel="training tokens (millions)", ylabel="training loss (nats per token)")
    tested = [point for point in points if point.get("heldout")]
    for i, pack in enumerate(tested[-1]["heldout"] if tested else ()):
        at = [point for point in tested if pack in point["heldout"]]
        (line,) = right.plot(
            [point["tokens"] / 1e6 for point in at], [point["heldout"][pack] for point in at],
            marker="o", markersize=3, linewidth=1.2, color=f"C{i}", label=pack,
        )  # fmt: skip
        if pack in ngram:
            right.axhline(ngram[pack], linestyle="--", linewidth=0.8, color=line.get_color())
    right.set(xlabel="training tokens (millions)", ylabel="held-out perplexity (completion tokens)", yscale="log")
    if tested:
        right.legend(frameon=False, fontsize=8, title="dashed: 5-gram" if ngram else None, title_fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
