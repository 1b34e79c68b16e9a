"""From scores to a mask: a budget, experts that stay whatever their score, and the rest by rank. Every decision is told.

The order in a layer: core experts, super experts and every tag's best are in; then, with a union, the experts that it names; then the
ranking, until the layer's number is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softprune.errors import MaskError
from softprune.mask import ExpertMask
from softprune.mask_forms import build
from softprune.ranking.scores import Scores
from softprune.ranking.scores_file import read
from softprune.selection.budget import BACKEND_MULTIPLES, Budget
from softprune.stats.figures import ranking

Target = Literal["mask", "checkpoint"]
Floats = NDArray[np.float64]
UNIFORM_CHECKPOINTS = ("GptOssForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM")
"""Architectures whose config names one number of experts for all layers."""


@dataclass(frozen=True)
class Union:
    """Experts by tag: of each, the best that hold a share of its mass (spec/metrics.md 3.5, `_union_keep_sets`).

    Attributes:
        coverage: share of a tag's mass, from 0 to 1.
        core: of all tags together, so many of the best are in whatever the coverage.
        normalise: give every tag the same mass in a layer before they are added; the study added raw masses.
    """

    coverage: float
    core: int = 4
    normalise: bool = True


@dataclass(frozen=True)
class Protect:
    """Experts that stay whatever their score, per layer.

    Attributes:
        top_mass: so many with the largest positive mass (spec/metrics.md 3.5, core_pos_top_m).
        top_count: so many that were chosen most often (core_count_top_m).
        super_experts: those whose output peaks stand out, as in REAP (spec/metrics.md 4): "outliers" in all layers, "super" in the first
            three quarters of them; needs a column max_activation.
        tag_top: of each tag, so many of its best.
    """

    top_mass: int = 0
    top_count: int = 0
    super_experts: Literal["none", "super", "outliers"] = "none"
    tag_top: int = 0


def select(
    scores: Scores | str | Path,
    keep: int | None = None,
    *,
    keep_frac: float | str | None = None,
    compression_ratio: float | str | None = None,
    rounding: Literal["ceil", "floor", "round"] = "ceil",
    keep_multiple: int | None = None,
    backend: str | None = None,
    by_layer: Literal["uniform", "neff"] = "uniform",
    minimum: int | None = None,
    maximum: int | None = None,
    protect: Protect | None = None,
    union: Union | None = None,
    target: Target = "mask",
    top_k: int | None = None,
    recipe: str | None = None,
) -> ExpertMask:
    """Choose the experts that stay.

    Args:
        scores: from `softprune.rank`, or a scores file.
        keep, keep_frac, compression_ratio, rounding, by_layer, minimum, maximum: see `Budget`; with a union, the number is a cap.
        keep_multiple: see `Budget.multiple`; without it, what `backend` needs.
        backend: MoE backend that is to run the smaller model.
        protect, union: see there.
        target: "checkpoint" if the mask is to be rewritten into one, which for known architectures asks for uniform layers.
        top_k: experts per token to write into the mask; None for the model's own.
        recipe: name for the provenance.

    Returns:
        A mask whose provenance tells, layer by layer, why each expert stays.

    Raises:
        MaskError: a budget that cannot be met, or something asked for that the scores do not hold.
        RankError: the scores file cannot be used.
    """
    found = scores if isinstance(scores, Scores) else read(scores)
    multiple = BACKEND_MULTIPLES.get((backend or "").replace("-", "_"), 1) if keep_multiple is None else keep_multiple
    budget = Budget(keep, keep_frac, compression_ratio, rounding, multiple, by_layer, minimum, maximum)
    guard, positive = protect or Protect(), np.maximum(found.values, 0)
    counts, told = budget.of_layers(_mass(found))
    supers = super_experts(found, guard.super_experts)
    rows: list[list[int]] = []
    layers: list[dict[str, Any]] = []
    for layer, number in enumerate(counts):
        forced = {**_core(found, guard, layer), **supers.get(layer, {}), **_tag_tops(found, guard.tag_top, layer)}
        named = None if union is None else _union(found, union, number, layer, positive)
        row, why = _choose(found, layer, number, forced, named, fill=target == "checkpoint" or union is None)
        rows.append(row)
        layers.append(why)
    _check_uniform(found, rows, target)
    provenance = {
        "method": found.method, "scores": found.digest, "scores_file": Path(found.source).name if found.digest else None, "recipe": recipe,
        "parameters": dict(found.parameters), "inputs": dict(found.inputs),
        "selection": {
            "budget": {name: value for name, value in asdict(budget).items() if value is not None}, **told,
            "protect": asdict(guard), "union": None if union is None else asdict(union), "target": target, "backend": backend,
        },
        "layers": layers,
    }  # fmt: skip
    return build(found.model.spec, rows, found.model.fingerprint, provenance, "selection", top_k)


def _choose(
    scores: Scores, layer: int, number: int, forced: Mapping[str, list[int]], named: Mapping[str, list[int]] | None, fill: bool
) -> tuple[list[int], dict[str, Any]]:
    """The ids that stay in one layer, and why."""
    kept: list[int] = []
    why: dict[str, Any] = {}
    for reason, ids in {**forced, **(named or {})}.items():
        new = [i for i in ids if i not in kept]
        if reason not in forced:
            new = new[: number - len(kept)]
        if new:
            why[reason] = new
        kept += new
        if len(kept) > number:
            told = ", ".join(f"{name} {len(some)}" for name, some in why.items())
            raise MaskError(f"layer {layer}", "keep", f"{number}", f"at least {len(kept)}, since so many are to stay: {told}")
    order = scores.ranking[layer].tolist()
    if fill:
        ranked = [i for i in order if i not in kept][: number - len(kept)]
        kept += ranked
        why["rank"] = ranked
    values = scores.values[layer]
    left = [i for i in order if i not in kept]
    why["lowest_kept"] = [i := min(kept, key=lambda i: (values[i], -i)), float(values[i])]
    why["best_pruned"] = [left[0], float(values[left[0]])] if left else None
    return sorted(kept), why


def _core(scores: Scores, guard: Protect, layer: int) -> dict[str, list[int]]:
    """Core experts by reason."""
    found = {}
    if guard.top_mass:
        mass = scores.columns.get("pos_gate_norm_sum", np.maximum(scores.values, 0))
        found["core by mass"] = ranking(mass[layer])[: guard.top_mass].tolist()
    if guard.top_count:
        if "count" not in scores.columns:
            raise MaskError(scores.source, "count", "no counts", "scores made from statistics, for core experts by count")
        found["core by count"] = ranking(scores.columns["count"][layer])[: guard.top_count].tolist()
    return found


def super_experts(scores: Scores, which: Literal["none", "super", "outliers"]) -> dict[int, dict[str, list[int]]]:
    """By layer, experts whose largest activation lies above the 99.5th percentile of all and above a tenth of the largest.

    Raises:
        MaskError: the scores do not hold activations.
    """
    if which == "none":
        return {}
    peaks = scores.columns.get("max_activation")
    if peaks is None:
        raise MaskError(
            scores.source, "max_activation", "no such column", "the largest activation of every expert, which statistics do not hold yet"
        )
    threshold = max(float(np.percentile(peaks, 99.5)), float(peaks.max()) / 10)
    last = len(peaks) if which == "outliers" else int(0.75 * len(peaks))
    return {layer: {"super experts": np.flatnonzero(peaks[layer] > threshold).tolist()} for layer in range(last)}


def _tag_tops(scores: Scores, number: int, layer: int) -> dict[str, list[int]]:
    if not number:
        return {}
    _require_tags(scores)
    return {f"best of tag {tag}": ranking(values[layer])[:number].tolist() for tag, values in scores.by_tag.items()}


def coverage_set(mass: Floats, coverage: float) -> list[int]:
    """Experts by falling mass until their share of it reaches `coverage`; [] where there is no mass (spec/metrics.md 3.5)."""
    total = mass.sum()
    if total <= 0:
        return []
    order = ranking(mass)
    reached = np.cumsum(mass[order]) >= coverage * total * (1 - 1e-12)
    return [int(i) for i in order[: int(np.argmax(reached)) + 1 if reached.any() else len(order)]]


def _union(scores: Scores, union: Union, cap: int, layer: int, positive: Floats) -> dict[str, list[int]]:
    """Experts that a union of the tags names, by reason, at most `cap` of them."""
    _require_tags(scores)
    if not 0 < union.coverage <= 1:
        raise MaskError("union", "coverage", str(union.coverage), "a share between 0 and 1")
    masses = {tag: np.maximum(values[layer], 0) for tag, values in scores.by_tag.items()}
    weights: Mapping[str, float] = scores.parameters.get("tags") or {}
    together = np.zeros(scores.model.num_experts)
    for tag, mass in masses.items():
        together += weights.get(tag, 1.0) * (mass / mass.sum() if union.normalise and mass.sum() else mass)
    core = ranking(together)[: union.core].tolist()
    sets = {tag: coverage_set(mass, union.coverage) for tag, mass in masses.items()}
    every = set(core).union(*sets.values())
    if len(every) > cap:
        top = [i for i in ranking(together).tolist() if i in every][:cap]
        return {f"union, cut from {len(every)}": top}
    return {"union core": core, **{f"coverage of tag {tag}": ids for tag, ids in sets.items()}}


def _mass(scores: Scores) -> Floats:
    """Where effective numbers are counted from: positive mass if the scores hold it, else the scores, cut at 0."""
    mass = scores.columns.get("pos_gate_norm_sum", scores.columns.get("gate_norm_sum", scores.values))
    return np.maximum(np.asarray(mass, np.float64), 0)


def _require_tags(scores: Scores) -> None:
    if not scores.by_tag:
        found = "scores of one tag, or of none"
        raise MaskError(scores.source, "softprune.by_tag", found, "scores of at least two tags, made from statistics with tags")


def _check_uniform(scores: Scores, rows: list[list[int]], target: Target) -> None:
    counts = sorted({len(row) for row in rows})
    if target == "checkpoint" and scores.model.architecture in UNIFORM_CHECKPOINTS and len(counts) > 1:
        raise MaskError(
            "selection", "keep", f"{counts[0]} to {counts[-1]} experts in a layer",
            f"one number, which a {scores.model.architecture} checkpoint has for all layers; as a mask (target mask) layers may differ",
        )  # fmt: skip
