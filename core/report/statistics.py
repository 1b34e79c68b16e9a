"""A statistics file's section: what was counted, which experts were chosen, how concentrated that is, how tags differ."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from softprune.report.chart import Axis, Frame
from softprune.report.heatmap import heatmap
from softprune.report.numbers import fixed, kept, number, percent, plural, short
from softprune.report.page import Section, Summary, render
from softprune.report.planes import H_LABEL, P_LABELS, Figure, Landscape, landscapes
from softprune.report.table import Cell, Table
from softprune.stats import figures
from softprune.stats.file import Statistics
from softprune.stats.header import KINDS, Header
from softprune.stats.layout import PLANE_BINS
from softprune.stats.summary import complete, count_name, eaft_figures, layer_figures, needed, selections, selections_of, tag_divergence

KIND_WORDS = {"teacher_forced": "given tokens", "sampled": "sampled tokens"}
CURVES = 8
"""Tags that have a curve of their own; more could not be told apart."""


def wanted(header: Header) -> set[str]:
    """Names of the tensors that the section reads."""
    return needed(header) | {"router.gate_sum"}


def statistics_section(statistics: Statistics, name: str, id_: str) -> tuple[Summary, Section]:
    """The section of a file that holds the tensors of `wanted`."""
    header = statistics.header
    routed, model = sum(tokens.routed for tokens in header.tokens.values()), header.model
    whole = complete(statistics)
    summary = (
        f"{name}: {routed:,} routed tokens of {plural(len(header.tags), 'tag')}, {model.num_layers} layers × {model.num_experts} experts, "
        f"{'no mask' if header.mask is None else 'under a mask'}. {_busiest(statistics)}"
    )
    body = render(
        "statistics.html",
        facts=_facts(header),
        warning="Selections are not routed tokens × top_k in every layer: something was not counted, or counted twice."
        if whole is False
        else "",
        heatmaps=_heatmaps(statistics),
        curve=concentration_curve(statistics),
        planes=_planes(statistics),
        tables=[_token_table(header), *_eaft_table(statistics), *_divergence_table(statistics)],
        layers=_layer_table(statistics),
        tags=_tag_heatmaps(statistics),
    )
    return Summary("", summary), Section(id_, f"Statistics: {name}", body)


def relative_shares(count: NDArray[Any]) -> NDArray[np.float64]:
    """Selections [layers, experts] over an even share: 1 for all, whatever the number of experts."""
    return np.asarray(figures.shares(count) * count.shape[-1], np.float64)


def _busiest(statistics: Statistics) -> str:
    count = selections_of(statistics, None)
    if not count.any():
        return "Nothing was counted."
    relative = relative_shares(count)
    layer, expert = np.unravel_index(int(np.nanargmax(relative)), relative.shape)
    unused = int((count == 0).sum())
    words = f"Most used is expert {expert} of layer {layer}, {number(float(relative[layer, expert]), 3)} times an even share"
    return f"{words}; {plural(unused, 'expert')} of {count.size:,} {'was' if unused == 1 else 'were'} never chosen."


def _facts(header: Header) -> list[tuple[str, str]]:
    model, epoch = header.model, header.epochs[0]
    every = {name: number for name, number in header.sampling.items() if number > 1}
    modes = [*header.modes, *(["shadow"] if "shadow" in header.sampling else [])]
    facts = [
        ("Model", f"{model.architecture}, {model.num_layers} MoE layers × {model.num_experts} experts, top_k {model.top_k}"),
        ("Fingerprint", short(model.fingerprint, 19)),
        ("Mask", "none" if header.mask is None else f"{short(header.mask, 19)}, {kept(epoch.num_kept, model.num_experts)} experts kept"),
        ("Collected", ", ".join(name + (f" (1 token in {every[name]})" if name in every else " (every token)") for name in modes)),
    ]
    if header.eaft:
        facts.append(("Attribution", header.eaft.attribution))
    for run in header.runs[:4]:
        words = "".join(f"; {mode}: {text}" for mode, text in sorted(run.sampled.items()))
        facts.append((f"Run {run.id}", f"{run.engine} {run.engine_version}, {run.started} to {run.ended}{words}"))
    if len(header.runs) > 4:
        facts.append(("Other runs", str(len(header.runs) - 4)))
    facts += [(f"Data set {data.id}", plural(len(data.hashes), "content hash", "es")) for data in header.data_sets]
    return facts


def _heatmaps(statistics: Statistics) -> list[Figure]:
    header, count = statistics.header, selections_of(statistics, None)
    shown = [("selections over an even share", relative_shares(count), "times an even share")]
    if "router" in header.modes:
        gates = figures.ratio(statistics["router.gate_sum"].sum((0, 1)), statistics["router.count"].sum((0, 1)))
        shown.append(("mean gate of the tokens that chose it", gates, "gate"))
    if "reap" in header.modes:
        reap = figures.ratio(statistics["reap.gate_norm_sum"].sum(0), statistics["reap.count"].sum(0))
        shown.append(("REAP mean: gate × norm of the output", reap, "gate × norm"))
    return [Figure(title, heatmap(values, _words(title, values), unit)) for title, values, unit in shown]


def _tag_heatmaps(statistics: Statistics) -> list[Figure]:
    tags = statistics.header.tags
    if len(tags) < 2:
        return []
    shown = [(tag, relative_shares(selections_of(statistics, tag))) for tag in tags]
    unit = "times an even share"
    return [Figure(tag, heatmap(values, _words(f"{tag}, selections", values), unit, titles=False)) for tag, values in shown]


def _words(title: str, values: NDArray[Any]) -> str:
    if not np.isfinite(values).any():
        return f"{title}: nothing was counted"
    layer, expert = np.unravel_index(int(np.nanargmax(values)), values.shape)
    largest, middle = number(float(values[layer, expert]), 3), number(float(np.nanmedian(values)), 3)
    return f"Heatmap, layers by experts, {title}: largest {largest} at layer {layer}, expert {expert}; median {middle}"


def concentration_curve(statistics: Statistics) -> Figure:
    """Share of selections that the n most used experts have, by n: each layer, their mean, and each tag's mean."""
    count = selections_of(statistics, None)
    experts, curves = count.shape[-1], figures.concentration(count)
    frame = Frame(Axis("experts, by falling share", 0, experts), Axis("share of selections", 0, 1.02))

    def line(values: NDArray[Any], class_: str) -> Markup:
        return frame.line([(0.0, 0.0), *((i + 1.0, float(value)) for i, value in enumerate(values))], class_)

    seen = np.isfinite(curves).all(-1)
    marks = [line(row, "faint") for row in curves[seen]]
    marks.append(frame.line([(0.0, 0.0), (float(experts), 1.0)], "even"))
    key = [("each layer", "faint"), ("even", "even")]
    tags = statistics.header.tags
    if 1 < len(tags) <= CURVES:
        for i, (tag, rows) in enumerate(zip(tags, figures.concentration(selections(statistics)), strict=True)):
            if np.isfinite(rows).any():
                marks.append(line(np.nanmean(rows, 0), f"c{i}"))
                key.append((tag, f"c{i}"))
    if seen.any():
        marks.append(line(curves[seen].mean(0), "strong"))
        key.append(("mean of layers", "strong"))
    half = int((curves[seen].mean(0) < 0.5).sum()) + 1 if seen.any() else 0
    words = f"Concentration curve: on average half of the selections go to the {half} most used of {experts} experts"
    return Figure(words, frame.drawn(words, frame.axes(), *marks), key)


def _planes(statistics: Statistics) -> list[Figure]:
    eaft = statistics.header.eaft
    if eaft is None:
        return []
    plane, scale = eaft.plane, "linear" if eaft.plane.p_scale == "linear" else "log"
    x_edges = np.linspace(plane.p_min, plane.p_max, PLANE_BINS[0] + 1)
    y_edges = np.linspace(plane.entropy_min, plane.entropy_max, PLANE_BINS[1] + 1)
    y_label = H_LABEL if plane.entropy == "top20" else "H, full vocabulary, nats"
    counts = statistics["eaft.hist"].sum(0)
    shown = [
        Landscape(KIND_WORDS[kind], counts[i], x_edges, y_edges, P_LABELS[scale], y_label)
        for i, kind in enumerate(KINDS)
        if counts[i].any()
    ]
    return landscapes(shown) if shown else []


def _token_table(header: Header) -> Table:
    columns = ("tag", "prefill, tokens", "decode, tokens", "routed, tokens", "from cache, not routed")
    rows = []
    for tag in header.tags:
        tokens = header.tokens[tag]
        rows.append([tag, *(f"{value:,}" for value in (tokens.prefill, tokens.decode, tokens.routed, tokens.cached))])
    return Table("Tokens by tag", columns, rows)


def _eaft_table(statistics: Statistics) -> list[Table]:
    rows = [
        [
            row.tag, KIND_WORDS[row.kind], f"{row.tokens:,}", number(row.perplexity), fixed(row.mean_p), fixed(row.mean_entropy, 3),
            fixed(row.mean_entropy_top20), fixed(row.p_q15), fixed(row.entropy_q15),
        ]
        for row in eaft_figures(statistics)
    ]  # fmt: skip
    columns = ("tag", "of", "tokens", "PPL", "mean p", "mean H, nats", "mean H, top 20 / ln 20", "p, 15 % quantile", "H, 15 % quantile")
    return [Table("Predicted tokens by tag", columns, rows, words=(1,))] if rows else []


def _divergence_table(statistics: Statistics) -> list[Table]:
    tags = statistics.header.tags
    if len(tags) < 2:
        return []
    values = tag_divergence(statistics)
    rows = [[tag, *(number(float(value), 3) if i != j else "0" for j, value in enumerate(values[i]))] for i, tag in enumerate(tags)]
    return [Table("Jensen-Shannon divergence of tags' selections, nats, mean over layers", ("tag", *tags), rows)]


def _layer_table(statistics: Statistics) -> Table:
    columns = (
        "layer", "experts used", "experts kept", "effective experts", "share of the top 8", "largest share", "its expert",
        "top-1 gate, median", "REAP mean",
    )  # fmt: skip
    rows: list[list[Cell | str]] = [
        [
            str(row.layer), str(row.used), str(row.kept), fixed(row.effective, 1), percent(row.top8_share), percent(row.max_share),
            str(row.max_expert) if row.used else "–", number(row.top1_gate_p50, 3), number(row.reap_mean, 3),
        ]
        for row in layer_figures(statistics, None)
    ]  # fmt: skip
    return Table(f"Layers, selections by {count_name(statistics.header)}, all tags", columns, rows)
