"""Perplexity against the number of experts kept, by method, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softprune.bench.tiny.methods_figures import RANDOM, UNMASKED

_MARKERS = "osD^vP*Xph<>"


def plot(figures: dict[str, Any], out: Path) -> None:
    """Write an SVG; same figures, same bytes.

    Args:
        figures: from `methods_figures.cells`.
        out: the file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "softprune"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    base = figures[UNMASKED]["ppl"]
    rows = figures["methods"]
    keeps = sorted((int(keep) for keep in rows[RANDOM]), reverse=True)
    for i, (method, row) in enumerate(rows.items()):
        found = [row[str(keep)] for keep in keeps]
        ppl = [entry["ppl"] for entry in found]
        low, high = zip(*(entry["interval"] for entry in found), strict=True)
        bars = [
            [max(0.0, p - edge) for p, edge in zip(ppl, low, strict=True)],
            [max(0.0, edge - p) for p, edge in zip(ppl, high, strict=True)],
        ]
        style: dict[str, Any] = {"color": f"C{i % 10}", "linewidth": 1.1}
        if method == RANDOM:
            style = {"color": "black", "linestyle": "--", "linewidth": 1.6}
        # Beside each other, so that intervals can be told apart.
        at = [keep + (i - len(rows) / 2) * 0.08 for keep in keeps]
        axes.errorbar(at, ppl, bars, label=method, marker=_MARKERS[i % len(_MARKERS)], markersize=4, elinewidth=0.7, **style)
        if method == RANDOM:
            for x, entry in zip(at, found, strict=True):
                axes.plot([x] * len(entry["seeds"]), entry["seeds"], "_", color="black", markersize=7)
    axes.axhline(base, color="grey", linewidth=0.8, linestyle=":", label=f"unmasked ({base:.3f})")
    axes.set(xlabel="experts kept of 32", ylabel="held-out UNION perplexity (completion tokens)", yscale="log", xticks=keeps)
    axes.invert_xaxis()
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
