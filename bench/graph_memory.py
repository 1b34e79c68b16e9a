"""What engines say of their CUDA graphs' memory: the same number, in whichever form they say it.

Engines take it for what was free before, less what is free after; whatever another process gives back meanwhile makes it less than nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def graph_entries(account: Any) -> list[float]:
    """GiB of each kind of graph, as reported.

    Args:
        account: a number, numbers by kind (SGLang's "prefill" and "decode"), or None for nothing that is known.
    """
    if account is None:
        return []
    return [float(gib) for gib in (account.values() if isinstance(account, Mapping) else [account])]


def graphs_gib(account: Any) -> float | None:
    """GiB of all graphs, no kind of which takes less than nothing; None if nothing is known. `account` is of `graph_entries`."""
    return None if account is None else round(sum(max(0.0, gib) for gib in graph_entries(account)), 3)
