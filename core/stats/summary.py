"""What `softprune stats show` and `diff` say, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.stats import figures
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics
from softprune.stats.header import KINDS, PHASES, Header
from softprune.stats.layout import PLANE_BINS

TOPS = (24, 16, 8)
"""Sizes of the tops that `diff` compares."""


@dataclass(frozen=True)
class LayerFigures:
    """One MoE layer.

    Attributes:
        layer: from 0.
        used, kept: experts that were selected at least once, and that the mask keeps.
        effective: effective number of experts (inverse Simpson).
        top8_share, max_share, max_expert: of the selections.
        top1_gate_p50: median top-1 gate, as the upper edge of its bin; None without `router`.
        reap_mean: gate times output norm, mean over sampled selections; None without `reap`.
    """

    layer: int
    used: int
    kept: int
    effective: float
    top8_share: float | None
    max_share: float | None
    max_expert: int
    top1_gate_p50: float | None
    reap_mean: float | None


@dataclass(frozen=True)
class EaftFigures:
    """One tag and kind: tokens scored, and means over them.

    Attributes:
        mean_entropy: full vocabulary, nats.
        mean_entropy_top20: of the 20 likeliest, over ln 20.
        p_q15, entropy_q15: quantiles on the axes of the plane.
    """

    tag: str
    kind: str
    tokens: int
    perplexity: float | None
    mean_p: float | None
    mean_entropy: float | None
    mean_entropy_top20: float | None
    p_q15: float | None
    entropy_q15: float | None


@dataclass(frozen=True)
class LayerDifference:
    """One MoE layer of two files: divergence in nats, Spearman's rho, and shares of the top n in common, by n."""

    layer: int
    js_divergence: float | None
    rank_correlation: float | None
    overlap: dict[str, float]


def count_name(header: Header) -> str:
    """The tensor that counts selections: the complete count if there is one, else a sampled one."""
    return {"router": "router.count", "reap": "reap.count", "eaft": "eaft.grid_count"}[header.modes[0]]


def needed(header: Header) -> set[str]:
    """Names of the tensors that `describe`, `compare` and the plots read: neither co-activation nor, if it can be helped, the grid."""
    sums = {f"eaft.{name}" for name in ("hist", "nll_sum", "p_sum", "entropy_sum", "entropy_top_sum")}
    return {count_name(header), "router.confidence", "reap.count", "reap.gate_norm_sum", *sums}


def selections(statistics: Statistics) -> NDArray[np.int64]:
    """Selections [tags, layers, experts], of all phases, kinds and cells together."""
    name = count_name(statistics.header)
    count = statistics[name]
    axes = {"router.count": (1,), "reap.count": (), "eaft.grid_count": (1, 4, 5)}[name]
    return np.asarray(count.sum(axes) if axes else count, np.int64)


def selections_of(statistics: Statistics, tag: str | None) -> NDArray[np.int64]:
    """Selections [layers, experts] of one tag, or of all.

    Raises:
        StatisticsError: there is no such tag.
    """
    count = selections(statistics)
    return np.asarray(count.sum(0) if tag is None else count[statistics.tag_index(tag)], np.int64)


def describe(statistics: Statistics, tag: str | None = None) -> dict[str, Any]:
    """Everything that `show` shows, JSON-ready; None where nothing was counted.

    Args:
        statistics: with the tensors of `needed`.
        tag: only this one in the figures of layers; None takes all together.

    Raises:
        StatisticsError: there is no such tag.
    """
    header = statistics.header
    return {
        "header": header.model_dump(),
        "tag": tag,
        "counted_by": count_name(header),
        "complete": complete(statistics),
        "layers": [asdict(row) for row in layer_figures(statistics, tag)],
        "eaft": [asdict(row) for row in eaft_figures(statistics) if tag in (None, row.tag)],
        "tag_divergence": [[_or_none(value) for value in row] for row in tag_divergence(statistics)],
    }


def complete(statistics: Statistics) -> bool | None:
    """Whether selections are routed tokens times top_k in every layer, tag and phase; None unless every run collected `router`."""
    header = statistics.header
    if not all("router" in run.modes for run in header.runs):
        return None
    tokens = np.array([[getattr(header.tokens[tag], phase) for phase in PHASES] for tag in header.tags])
    expected = tokens[:, :, None] * np.array(header.epochs[0].top_k)
    return bool(np.array_equal(statistics["router.count"].sum(-1), expected))


def layer_figures(statistics: Statistics, tag: str | None) -> list[LayerFigures]:
    """One row a layer."""
    header, count = statistics.header, selections_of(statistics, tag)
    effective, top8, share = figures.effective_number(count), figures.top_share(count, 8), figures.shares(count)
    chosen = slice(None) if tag is None else slice(statistics.tag_index(tag), statistics.tag_index(tag) + 1)
    medians: list[float | None] = [None] * len(count)
    if header.confidence_bins is not None:
        edges = np.linspace(0, 1, header.confidence_bins + 1)
        histograms = statistics["router.confidence"][chosen].sum((0, 1))
        medians = [figures.quantile(histogram, edges, 0.5) if histogram.any() else None for histogram in histograms]
    reap: list[float | None] = [None] * len(count)
    if "reap" in header.modes:
        sums, counts = (statistics[f"reap.{name}"][chosen].sum((0, 2)) for name in ("gate_norm_sum", "count"))
        reap = [_or_none(value) for value in figures.ratio(sums, counts)]
    return [
        LayerFigures(
            layer, int((row > 0).sum()), header.epochs[0].num_kept[layer], float(effective[layer]), _or_none(top8[layer]),
            _or_none(share[layer].max()), int(row.argmax()), medians[layer], reap[layer],
        )
        for layer, row in enumerate(count)
    ]  # fmt: skip


def eaft_figures(statistics: Statistics) -> list[EaftFigures]:
    """One row for each tag and kind of which tokens were scored; [] without `eaft`."""
    header, rows = statistics.header, []
    if header.eaft is None:
        return []
    plane = header.eaft.plane
    p_edges = np.linspace(plane.p_min, plane.p_max, PLANE_BINS[0] + 1)
    p_edges = 10**p_edges if plane.p_scale == "log10" else p_edges
    h_edges = np.linspace(plane.entropy_min, plane.entropy_max, PLANE_BINS[1] + 1)
    for i, tag in enumerate(header.tags):
        for k, kind in enumerate(KINDS):
            histogram = statistics["eaft.hist"][i, k]
            tokens = int(histogram.sum())
            if tokens:
                means = [float(statistics[f"eaft.{name}"][i, k]) / tokens for name in ("p_sum", "entropy_sum", "entropy_top_sum")]
                perplexity = float(figures.perplexity(statistics["eaft.nll_sum"][i, k], np.asarray(tokens)))
                lows = [figures.quantile(histogram.sum(1 - axis), edges, 0.15) for axis, edges in enumerate((p_edges, h_edges))]
                rows.append(EaftFigures(tag, kind, tokens, perplexity, *means, *lows))
    return rows


def tag_divergence(statistics: Statistics) -> NDArray[np.float64]:
    """Jensen-Shannon divergence (nats) of two tags' selections, mean over layers, [tags, tags]; NaN for tags without selections."""
    count = selections(statistics)
    return np.asarray(figures.js_divergence(count[:, None], count[None, :]).mean(-1), np.float64)


def compare(a: Statistics, b: Statistics, tag: str | None = None) -> dict[str, Any]:
    """Everything that `diff` shows, JSON-ready; of models of one shape, whatever their weights and masks.

    Raises:
        StatisticsError: the shapes differ, or there is no such tag.
    """
    for field in ("num_layers", "num_experts"):
        found, expected = getattr(b.header.model, field), getattr(a.header.model, field)
        if found != expected:
            raise StatisticsError(b.source, f"model.{field}", str(found), f"{expected}, as in {a.source}")
    one, two = selections_of(a, tag), selections_of(b, tag)
    js, rho = figures.js_divergence(one, two), figures.rank_correlation(one, two)
    tops = {n: figures.overlap(one, two, n) for n in TOPS if n < a.header.model.num_experts}
    empty = (one.sum(-1) == 0) | (two.sum(-1) == 0)
    layers = [
        LayerDifference(
            layer, _or_none(js[layer]), _or_none(rho[layer]),
            {} if empty[layer] else {str(n): float(values[layer]) for n, values in tops.items()},
        )
        for layer in range(len(one))
    ]  # fmt: skip
    return {
        "a": a.source,
        "b": b.source,
        "tag": tag,
        "same_weights": a.header.model.fingerprint == b.header.model.fingerprint,
        "same_mask": a.header.mask == b.header.mask,
        "counted_by": [count_name(a.header), count_name(b.header)],
        "layers": [asdict(row) for row in layers],
    }


def _or_none(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
