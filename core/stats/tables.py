"""`softprune stats show` and `diff` for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from softprune.stats.header import Header
from softprune.stats.summary import TOPS

_SHORT = 15
"""Characters of a hash that are shown."""


def header_lines(header: Header) -> Iterator[str]:
    """What was counted, in a few lines; what users named is escaped."""
    model, mask, epoch = header.model, header.mask, header.epochs[0]
    shape = f"{model.num_layers} layers x {model.num_experts} experts, top_k {model.top_k}"
    yield f"{escape(model.architecture)}, {shape}, {_cut(model.fingerprint)}"
    kept = f"{min(epoch.num_kept)}" if len(set(epoch.num_kept)) == 1 else f"{min(epoch.num_kept)} to {max(epoch.num_kept)}"
    epochs = f"{len(header.epochs)} epoch{'s' * (len(header.epochs) > 1)}"
    yield f"no mask ({epochs})" if mask is None else f"mask {_cut(mask)}, {kept} of {model.num_experts} experts kept ({epochs})"
    names = [*header.modes, *(["shadow"] if "shadow" in header.sampling else [])]
    every = {name: number for name, number in header.sampling.items() if number > 1}
    yield "collected: " + ", ".join(name + (f" (1 token in {every[name]})" if name in every else "") for name in names)
    if header.eaft:
        yield f"attribution: {header.eaft.attribution}"
    for run in header.runs[:8]:
        words = "".join(f"; {mode}: {text}" for mode, text in sorted(run.sampled.items()))
        yield escape(f"run {run.id}: {run.engine} {run.engine_version}, {run.started} to {run.ended}{words}")
    if len(header.runs) > 8:
        yield f"and {len(header.runs) - 8} more runs"
    for data_set in header.data_sets:
        yield escape(f"data set {data_set.id}: {len(data_set.hashes)} hashes")


def token_table(header: Header) -> Table:
    """Tokens by tag and phase."""
    table = _table("tag", "prefill", "decode", "routed", "from cache, not routed")
    for tag in header.tags:
        tokens = header.tokens[tag]
        table.add_row(escape(tag), *(f"{number:,}" for number in (tokens.prefill, tokens.decode, tokens.routed, tokens.cached)))
    return table


def shown(header: Header, data: dict[str, Any]) -> Iterator[RenderableType]:
    """All of `show`, from `summary.describe`."""
    yield from header_lines(header)
    yield token_table(header)
    if data["complete"] is False:
        yield "[bold red]warning:[/] selections are not routed tokens x top_k in every layer: something was not counted, or counted twice"
    rows = data["layers"]
    extra = [(title, key) for title, key in (("top-1 gate", "top1_gate_p50"), ("gate x norm", "reap_mean")) if _any(rows, key)]
    table = _table("layer", "used", "kept", "effective", "top 8", "largest", "expert", *(title for title, _ in extra))
    for row in rows:
        cells = [row["layer"], row["used"], row["kept"], _number(row["effective"], ".1f"), _number(row["top8_share"], ".1%")]
        largest = row["max_expert"] if row["used"] else "-"
        table.add_row(*map(str, [*cells, _number(row["max_share"], ".1%"), largest, *(_number(row[key], ".3g") for _, key in extra)]))
    whose = "all tags" if data["tag"] is None else f"tag {escape(data['tag'])}"
    yield f"selections by {data['counted_by']}, {whose}: experts used and kept, effective number, share of the top 8 and the largest"
    yield table
    if data["eaft"]:
        yield "predicted tokens, means and 15 % quantiles"
        yield _eaft_table(data["eaft"])
    if len(header.tags) > 1 and data["tag"] is None:
        yield "Jensen-Shannon divergence of tags (nats, mean over layers)"
        table = _table("", *map(escape, header.tags))
        for tag, values in zip(header.tags, data["tag_divergence"], strict=True):
            table.add_row(escape(tag), *(_number(value, ".4f") for value in values))
        yield table


def compared(data: dict[str, Any]) -> Iterator[RenderableType]:
    """All of `diff`, from `summary.compare`."""
    for key, text in (("same_weights", "made with different weights (fingerprints differ)"), ("same_mask", "made under different masks")):
        if not data[key]:
            yield text
    tops = [str(n) for n in TOPS if any(str(n) in row["overlap"] for row in data["layers"])]
    table = _table("layer", "JS divergence (nats)", "rank correlation", *(f"top {n} in common" for n in tops))
    for row in data["layers"]:
        cells = [_number(row["js_divergence"], ".4f"), _number(row["rank_correlation"], ".4f")]
        table.add_row(str(row["layer"]), *cells, *(_number(row["overlap"].get(n), ".1%") for n in tops))
    yield table


def _eaft_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("tag", "tokens", "number", "perplexity", "p", "H (nats)", "H top 20", "p 15 %", "H 15 %")
    kinds = {"teacher_forced": "given", "sampled": "sampled"}
    for row in rows:
        names = ("perplexity", "mean_p", "mean_entropy", "mean_entropy_top20", "p_q15", "entropy_q15")
        table.add_row(escape(row["tag"]), kinds[row["kind"]], f"{row['tokens']:,}", *(_number(row[name], ".4g") for name in names))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _any(rows: list[dict[str, Any]], key: str) -> bool:
    return any(row[key] is not None for row in rows)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cut(text: str | None) -> str:
    return "none" if text is None else f"{text[:_SHORT]}…"
