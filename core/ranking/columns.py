"""Quantities that stand beside a score whatever the criterion, under the study's names (spec/metrics.md 3.1 and 6)."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from softprune.ranking.tags import TagWeights, combine
from softprune.stats.file import Statistics

TENSORS = ("router.count", "router.gate_sum", "reap.count", "reap.norm_sum", "reap.gate_norm_sum")
"""What `columns` reads, as far as it was collected."""


def columns(statistics: Statistics, tags: TagWeights) -> dict[str, NDArray[Any]]:
    """count, gate_mean, norm_mean, saliency_mean and gate_norm_sum, as far as they were collected; [num_layers, num_experts].

    Tags are weighted, never normalised, so that counts stay counts.
    """
    plain, tensors = TagWeights(tags.weights), statistics.tensors
    found: dict[str, NDArray[Any]] = {}
    if "router.count" in tensors:
        count = tensors["router.count"].sum(1)
        found["count"] = combine(plain, statistics, count)
        if "router.gate_sum" in tensors:
            found["gate_mean"] = combine(plain, statistics, tensors["router.gate_sum"].sum(1), count)
    if "reap.count" in tensors:
        count = tensors["reap.count"]
        found.setdefault("count", combine(plain, statistics, count))
        found["norm_mean"] = combine(plain, statistics, tensors["reap.norm_sum"], count)
        found["saliency_mean"] = combine(plain, statistics, tensors["reap.gate_norm_sum"], count)
        found["gate_norm_sum"] = combine(plain, statistics, tensors["reap.gate_norm_sum"])
    return found
