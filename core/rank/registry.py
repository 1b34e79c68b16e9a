"""All criteria by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprune.rank.criterion import Criterion, build
from softprune.rank.eaft_reap import EaftReap
from softprune.rank.ean import Ean
from softprune.rank.errors import RankError
from softprune.rank.frequency import Frequency
from softprune.rank.gate_mass import GateMass
from softprune.rank.random_order import Random
from softprune.rank.reap import Reap
from softprune.rank.reap_sum import ReapSum
from softprune.rank.topical import Topical
from softprune.rank.weights import Weights

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
