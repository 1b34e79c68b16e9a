"""Adding up tags: which count, how much, and whether a large one drowns the small ones.

The one place for it. A criterion gives sums by tag, and for a mean the counts to divide them by; here they become one number for each
expert. The study added raw sums, so that domains with more sampled tokens dominated (spec/metrics.md 3.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.errors import shortened
from softprune.ranking.errors import RankError
from softprune.stats.file import Statistics

Values = NDArray[np.float64]


@dataclass(frozen=True)
class TagWeights:
    """How tags are added.

    Attributes:
        weights: by tag, positive; tags that it does not name count nothing. {} counts all tags alike.
        normalise: divide each tag's values by their absolute sum over the layer first, so that every tag has the same say whatever its
            number of tokens; of signed sums, so that what cancels does not blow up the rest.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    normalise: bool = False

    def of(self, statistics: Statistics) -> Values:
        """Weight of every tag of a file, float64 [num_tags].

        Raises:
            RankError: a tag that the file does not have, or a weight that is not a positive number.
        """
        tags = statistics.header.tags
        for tag, weight in self.weights.items():
            if tag not in tags:
                raise RankError(statistics.source, "tags", f"no tag {tag!r}", f"one of {', '.join(tags)}")
            if not (np.isfinite(weight) and weight > 0):
                raise RankError("tag weights", tag, shortened(weight), "a positive number")
        return np.array([self.weights.get(tag, 0.0) if self.weights else 1.0 for tag in tags])


def combine(tags: TagWeights, statistics: Statistics, numerator: NDArray[Any], denominator: NDArray[Any] | None = None) -> Values:
    """One value for each expert from values by tag.

    Without normalising, a sum is the weighted sum of the tags' sums, and a mean the weighted sum over the weighted count, as if
    a tag's tokens had been given that often. With it, each tag's own sums or means are divided by their absolute sum over the
    layer before they are weighted and added.

    Args:
        tags, statistics: see above.
        numerator: [num_tags, num_layers, num_experts], of any sign.
        denominator: counts of the same shape, for a mean; an expert that was never counted gets 0, as in the study.

    Returns:
        float64 [num_layers, num_experts].
    """
    weights = tags.of(statistics)[:, None, None]
    if not tags.normalise:
        total = (weights * numerator).sum(0)
        return np.asarray(total if denominator is None else _over(total, (weights * denominator).sum(0)), np.float64)
    own = np.asarray(numerator, np.float64) if denominator is None else _over(numerator, denominator)
    return np.asarray((weights * _over(own, np.abs(own).sum(-1, keepdims=True))).sum(0), np.float64)


def by_tag(tags: TagWeights, statistics: Statistics, numerator: NDArray[Any], denominator: NDArray[Any] | None = None) -> dict[str, Values]:
    """The same quantity of each tag that counts and has any, unweighted; {} where that is one tag only."""
    own = np.asarray(numerator, np.float64) if denominator is None else _over(numerator, denominator)
    weights = tags.of(statistics)
    found = {
        tag: own[i]
        for i, tag in enumerate(statistics.header.tags)
        if weights[i] and np.any(numerator[i] if denominator is None else denominator[i])
    }
    return found if len(found) > 1 else {}


def _over(numerator: NDArray[Any], denominator: NDArray[Any]) -> Values:
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.asarray(np.divide(top, bottom, out=np.zeros(top.shape), where=bottom != 0), np.float64)
