"""Statistics as a picture: where the selections go, how concentrated they are, and how tags differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from softprune.files import replaced_after
from softprune.stats import figures
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics
from softprune.stats.summary import selections, selections_of, tag_divergence

SUFFIXES = (".svg", ".png")


def check_suffix(path: Path) -> None:
    """Refuse other pictures than SVG and PNG.

    Raises:
        StatisticsError: another suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise StatisticsError(str(path), "", f"the suffix {path.suffix!r}", " or ".join(SUFFIXES))


def plot(statistics: Statistics, path: Path, tag: str | None = None) -> None:
    """Write an SVG or PNG: selections by layer and expert, concentration curves, tag against tag; same statistics, same bytes.

    Args:
        statistics: with the tensors of `summary.needed`.
        path: the file.
        tag: draw the first two of this tag only; None takes all together.

    Raises:
        StatisticsError: another suffix, no such tag, or a file that cannot be written.
    """
    check_suffix(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    count = selections_of(statistics, tag)
    tags = statistics.header.tags
    with mpl.rc_context({"svg.hashsalt": "softprune"}):
        figure = Figure(figsize=(16, 4.6) if len(tags) > 1 else (12, 4.6), layout="constrained")
        panels = figure.subplots(1, 3 if len(tags) > 1 else 2, width_ratios=[2, 1, 1][: 3 if len(tags) > 1 else 2])
        _heatmap(figure, panels[0], count)
        _curves(panels[1], statistics, count, tag)
        if len(tags) > 1:
            _matrix(figure, panels[2], statistics)
        figure.suptitle("all tags" if tag is None else f"tag {_plain(tag)}", fontsize=10)
        try:
            with replaced_after(path) as temporary:
                form = path.suffix.lower().removeprefix(".")
                figure.savefig(temporary, format=form, dpi=150, metadata={"Date": None} if form == "svg" else {"Software": None})
        except OSError as error:
            raise StatisticsError(str(path), "", error.strerror or str(error), "a place that can be written") from None


def _heatmap(figure: Any, axes: Any, count: Any) -> None:
    # 1 is an even share, so that models of any number of experts read alike.
    relative = figures.shares(count) * count.shape[-1]
    image = axes.imshow(relative, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axes.set(xlabel="expert", ylabel="MoE layer", title="selections over an even share")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, shrink=0.9)


def _curves(axes: Any, statistics: Statistics, count: Any, tag: str | None) -> None:
    experts = np.arange(count.shape[-1] + 1)

    def curve(values: Any) -> Any:
        return np.concatenate([[0.0], values])

    layers = figures.concentration(count)
    for row in layers:
        axes.plot(experts, curve(row), color="#bbbbbb", linewidth=0.6)
    axes.plot([0, count.shape[-1]], [0, 1], color="black", linestyle=":", linewidth=0.8, label="even")
    axes.plot(experts, curve(layers.mean(0)), color="black", linewidth=1.6, label="mean of layers")
    header = statistics.header
    if tag is None and len(header.tags) > 1:
        for i, (name, rows) in enumerate(zip(header.tags, figures.concentration(selections(statistics)), strict=True)):
            if np.isfinite(rows).any():
                axes.plot(experts, curve(rows.mean(0)), color=f"C{i}", linewidth=1.0, label=_plain(name))
    axes.set(xlabel="experts, by falling share", ylabel="share of selections", title="concentration", ylim=(0, 1.02))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _matrix(figure: Any, axes: Any, statistics: Statistics) -> None:
    divergence, tags = tag_divergence(statistics), [_plain(tag) for tag in statistics.header.tags]
    image = axes.imshow(divergence, cmap="magma", vmin=0)
    for (i, j), value in np.ndenumerate(divergence):
        if np.isfinite(value):
            light = value < 0.6 * np.nanmax(divergence)
            axes.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=7, color="white" if light else "black")
    axes.set(title="JS divergence of tags (nats)", xticks=range(len(tags)), yticks=range(len(tags)))
    axes.set_xticklabels(tags, rotation=45, ha="right", fontsize=8)
    axes.set_yticklabels(tags, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _plain(text: str) -> str:
    """A user's text as it stands: neither mathematics, nor too long for a label."""
    return (text if len(text) <= 24 else text[:23] + "…").replace("$", r"\$")
