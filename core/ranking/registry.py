"""All criteria by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprune.ranking.criterion import Criterion, build
from softprune.ranking.eaft_reap import EaftReap
from softprune.ranking.ean import Ean
from softprune.ranking.errors import RankError
from softprune.ranking.frequency import Frequency
from softprune.ranking.gate_mass import GateMass
from softprune.ranking.random_order import Random
from softprune.ranking.reap import Reap
from softprune.ranking.reap_sum import ReapSum
from softprune.ranking.topical import Topical
from softprune.ranking.weights import Weights

CRITERIA: dict[str, type[Criterion]] = {
    "frequency": Frequency, "gate_mass": GateMass, "reap": Reap, "reap_sum": ReapSum, "ean": Ean, "eaft_reap": EaftReap,
    "random": Random, "weights": Weights, "topical": Topical,
}  # fmt: skip
ALIASES = {"eaftreap": "eaft_reap", "freq": "frequency", "aimer": "weights"}
"""Names of the study and of others."""


def criterion(name: str, parameters: Mapping[str, Any] | None = None) -> Criterion:
    """A criterion by its name, with parameters.

    Raises:
        RankError: no such criterion, or no such parameter.
    """
    known = ALIASES.get(name, name)
    if known not in CRITERIA:
        raise RankError("--method", "", name, f"one of {', '.join(CRITERIA)}")
    return build(known, CRITERIA[known], parameters or {})
