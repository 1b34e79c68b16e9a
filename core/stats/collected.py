"""From what the device added up to the tensors of a statistics file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # torch, without which files are read and merged
    from softprune.runtime.router_stats import RouterSums


def router_tensors(sums: RouterSums) -> dict[str, NDArray[Any]]:
    """The tensors of the mode `router`, for `Statistics.of`; tags in the collector's order.

    The collector's co-activation is symmetric; the file keeps its upper triangle and the diagonal.
    """
    return {
        "router.count": sums.count.numpy(),
        "router.gate_sum": sums.gate_sum.numpy(),
        "router.confidence": sums.confidence.numpy(),
        "router.coactivation": np.triu(sums.coactivation.numpy()),
    }
