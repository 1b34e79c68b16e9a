"""Which masks nothing beats in both speed and quality."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point is on the front.

    Args:
        points: (speed, perplexity); more of the first and less of the second is better.

    Returns:
        False where another point is at least as good in both, and better in one.
    """
    return [
        not any(speed >= own and loss <= cost and (speed, loss) != (own, cost) for speed, loss in points) for own, cost in points
    ]  # fmt: skip
