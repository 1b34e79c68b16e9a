"""A report's pictures: tok/s against batch, ratios with their intervals, and what a server's memory holds. Same rows, same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprune.bench.report_rows import Compared, Memory, Speed
from softprune.files import replaced_after

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X"
_FOR_A_CURVE = 3
"""Batch sizes from which on a ratio is drawn against them."""
# Text stays text, which keeps files small; no date and no random ids, so that a file changes only with its rows.
_STYLE: Any = {
    "svg.hashsalt": "softprune", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip


@contextmanager
def _drawn(path: Path, width: float, height: float) -> Iterator[Figure]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replaced_after(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def plot_speeds(speeds: list[Speed], path: Path) -> None:
    """Tokens per second of one setting against the batch size, a curve for each model and variant.

    Points are medians, bars run from the least to the most of the repeats, and points of fewer than three are hollow.
    """
    with _drawn(path, 7.5, 3.8) as figure:
        panel = figure.subplots()
        for i, curve in enumerate(dict.fromkeys((speed.model, speed.variant) for speed in speeds)):
            points = sorted((speed for speed in speeds if (speed.model, speed.variant) == curve), key=lambda speed: speed.batch)
            _curve(panel, points, f"C{i % 10}", _MARKERS[i % len(_MARKERS)], ", ".join(curve))
        batches = sorted({speed.batch for speed in speeds})
        panel.set(xscale="log", xlabel="batch (requests at once)", ylabel="tokens / s", ylim=(0, None))
        figure.suptitle(speeds[0].setting.text, fontsize=9)  # wider than a panel
        panel.set_xticks(batches, labels=[str(batch) for batch in batches])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8)


def _curve(panel: Axes, points: list[Speed], color: str, marker: str, label: str) -> None:
    at, middle = [one.batch for one in points], [one.median for one in points]
    panel.plot(at, middle, color=color, linewidth=1.1, label=label, marker=marker, markersize=4)
    panel.vlines(at, [min(one.tok_s) for one in points], [max(one.tok_s) for one in points], color=color, linewidth=0.8)
    few = [one for one in points if one.is_marked]
    over: dict[str, Any] = {"linestyle": "", "marker": marker, "color": color, "markersize": 4, "markerfacecolor": "white", "zorder": 3}
    panel.plot([one.batch for one in few], [one.median for one in few], **over)


def plot_ratios(compared: list[Compared], path: Path) -> None:
    """Each ratio of one setting with its interval; hollow and without an interval where there were too few pairs.

    A row each, or, where the same two were compared at several batch sizes, curves against the batch size, apart by what is divided by.
    """
    pairs = Counter((one.a, one.b) for one in compared)
    if max(pairs.values()) >= _FOR_A_CURVE:
        _ratios_by_batch(compared, path)
    else:
        _ratios_in_rows(compared, path)


def _ratios_by_batch(compared: list[Compared], path: Path) -> None:
    divisors = [name for name, _ in Counter(one.a for one in compared).most_common()]
    batches = sorted({one.batch for one in compared})
    with _drawn(path, 7.5, 0.4 + 2.5 * len(divisors)) as figure:
        panels = figure.subplots(len(divisors), sharex=True, squeeze=False)[:, 0]
        for panel, divisor in zip(panels, divisors, strict=True):
            panel.axhline(1, color="grey", linewidth=0.8, linestyle=":")
            for i, other in enumerate(dict.fromkeys(one.b for one in compared if one.a == divisor)):
                points = sorted((one for one in compared if (one.a, one.b) == (divisor, other)), key=lambda one: one.batch)
                _ratio_curve(panel, points, f"C{i % 10}", _MARKERS[i % len(_MARKERS)], other)
            panel.set(xscale="log", ylabel=f"tokens / s over\n{divisor}")
            panel.set_xticks(batches, labels=[str(batch) for batch in batches])
            panel.minorticks_off()
            panel.grid(alpha=0.25)
            panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        panels[-1].set_xlabel("batch (requests at once)")
        figure.suptitle(compared[0].setting.text, fontsize=9)


def _ratio_curve(panel: Axes, points: list[Compared], color: str, marker: str, label: str) -> None:
    panel.plot(
        [one.batch for one in points], [one.median for one in points], color=color, linewidth=1.1, label=label, marker=marker, markersize=4
    )
    for one in points:
        if one.low is not None and one.high is not None:
            panel.vlines(one.batch, one.low, one.high, color=color, linewidth=2.2, alpha=0.5)
        panel.plot(one.batch, one.median, marker, color=color, markersize=4, markerfacecolor="white" if one.is_marked else color)


def _ratios_in_rows(compared: list[Compared], path: Path) -> None:
    with _drawn(path, 7.5, 1.0 + 0.28 * len(compared)) as figure:
        panel = figure.subplots()
        panel.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        for row, one in enumerate(compared):
            if one.low is not None and one.high is not None:
                panel.plot([one.low, one.high], [row, row], "-", color="C0", linewidth=2.2, alpha=0.5)
            panel.plot(one.median, row, "o", color="C0", markersize=5, markerfacecolor="white" if one.is_marked else "C0")
        panel.set_yticks(range(len(compared)), labels=[f"{one.b} / {one.a}, batch {one.batch}" for one in compared])
        panel.set(ylim=(len(compared) - 0.4, -0.6), xlabel="ratio of tokens / s, with its 95 % interval")
        figure.suptitle(compared[0].setting.text, fontsize=9)
        panel.grid(alpha=0.25, axis="x")


def plot_memory(memory: list[Memory], path: Path) -> None:
    """Weights, KV cache and graphs of each server, stacked."""
    parts: dict[str, Any] = {
        "weights": [one.weights for one in memory], "KV cache": [one.kv for one in memory], "CUDA graphs": [one.graphs for one in memory],
    }  # fmt: skip
    with _drawn(path, 7.5, 1.1 + 0.35 * len(memory)) as figure:
        panel = figure.subplots()
        left = [0.0] * len(memory)
        for i, (part, values) in enumerate(parts.items()):
            panel.barh(range(len(memory)), values, left=left, height=0.6, color=f"C{i}", label=part)
            left = [a + b for a, b in zip(left, values, strict=True)]
        panel.set_yticks(range(len(memory)), labels=[one.label for one in memory])
        panel.set(xlabel="GiB, as the engine reports them", ylim=(len(memory) - 0.4, -0.6))
        panel.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
