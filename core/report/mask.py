"""A mask's section: which experts it keeps, and what share of the selections these have where statistics are given."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.mask import ExpertMask
from softprune.report.heatmap import heatmap, keep_picture
from softprune.report.numbers import percent, short
from softprune.report.page import Section, Summary, render
from softprune.report.planes import Figure
from softprune.report.statistics import relative_shares
from softprune.report.table import Table
from softprune.stats import figures
from softprune.stats.file import Statistics
from softprune.stats.summary import selections_of

LONGEST = 200
"""Characters of one entry of the provenance; reasons by layer are much longer."""


def mask_section(mask: ExpertMask, name: str, id_: str, statistics: list[tuple[str, Statistics]]) -> tuple[Summary, Section]:
    """The section of a mask, beside those statistics that are of a model of its shape."""
    model, layers = mask.model, mask.model.num_layers
    share = sum(mask.num_kept) / (model.num_experts * layers)
    pruned = [mask.pruned(layer) for layer in range(layers)]
    drawings = [Figure("experts kept", keep_picture(mask.keep, model.num_experts, f"{name}: {mask.summary} in {layers} layers"))]
    notes, tables, held = [], [], []
    for source, stats in statistics:
        other, count = stats.header.model, selections_of(stats, None)
        if (other.num_layers, other.num_experts) != (layers, model.num_experts):
            found = f"{other.num_layers} layers × {other.num_experts} experts"
            notes.append(f"{source} is of another model ({found}; the mask has {layers} × {model.num_experts}), so it is not drawn here.")
            continue
        if other.fingerprint != model.fingerprint:
            notes.append(f"{source} and the mask are for different weights: their fingerprints differ.")
        if stats.header.mask is not None:
            notes.append(f"{source} was itself counted under a mask, so that pruned experts have no selections.")
        words = f"selections in {source} over an even share; pruned experts are crossed out"
        drawings.append(Figure(words, heatmap(relative_shares(count), words, "times an even share", pruned)))
        tables.append(_coverage(mask, count, source))
        held.append(f"they had {percent(float(np.nanmean(_held(mask, count))))} of the selections in {source}")
    body = render("mask.html", facts=_facts(mask), notes=notes, drawings=drawings, tables=tables)
    sentence = f"{name} keeps {share:.1%} of the experts: {mask.summary} in {layers} layers".replace("%", " %")
    return Summary("", "; ".join([sentence, *held]) + "."), Section(id_, f"Mask: {name}", body)


def _facts(mask: ExpertMask) -> list[tuple[str, str]]:
    model = mask.model
    own = f"the model's own, {model.top_k}" if mask.top_k is None else f"{mask.top_k} (the model's own is {model.top_k})"
    facts = [
        ("Model", f"{model.architecture}, {model.num_layers} MoE layers × {model.num_experts} experts"),
        ("Fingerprint", short(model.fingerprint, 19)),
        ("Mask", short(mask.hash, 19)),
        ("Experts per token", own),
    ]
    for key, value in mask.provenance.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        facts.append((f"Provenance: {key}", short(text, LONGEST)))
    return facts


def _held(mask: ExpertMask, count: NDArray[Any]) -> NDArray[np.float64]:
    """Share of each layer's selections that kept experts have."""
    shares = figures.shares(count)
    return np.array([shares[layer, mask.kept(layer)].sum() for layer in range(len(count))])


def _coverage(mask: ExpertMask, count: NDArray[Any], source: str) -> Table:
    shares, held, rows = figures.shares(count), _held(mask, count), []
    for layer in range(len(count)):
        gone = mask.pruned(layer)
        most = max(gone, key=lambda i: (shares[layer, i], -i), default=None)
        lost = "–" if most is None else percent(float(shares[layer, most])) if np.isfinite(shares[layer, most]) else "–"
        here = percent(float(held[layer])) if np.isfinite(held[layer]) else "–"
        rows.append([str(layer), str(mask.num_kept[layer]), here, "–" if most is None else str(most), lost])
    columns = ("layer", "experts kept", "selections that they had", "most used expert that goes", "its share")
    return Table(f"What the mask keeps of {source}, by layer", columns, rows)
