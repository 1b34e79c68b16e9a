"""`reap_sum`: sum over the tokens that chose an expert of gate times output norm (spec/metrics.md 3.1: the sum is most of the gain)."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from softprune.ranking.columns import TENSORS, columns
from softprune.ranking.criterion import PARAMETERS, FromStatistics, Scored, Source
from softprune.ranking.tags import by_tag, combine


@dataclass(frozen=True, config=PARAMETERS)
class ReapSum(FromStatistics):
    """As REAP, without the division by the count."""

    about: ClassVar[str] = "sum of gate x output norm"

    def tensors(self) -> tuple[str, ...]:
        return TENSORS

    def score(self, source: Source) -> Scored:
        statistics = self.statistics(source)
        sums = statistics["reap.gate_norm_sum"]
        return Scored(
            combine(source.tags, statistics, sums), "gate_norm_sum", "g(x) * ||f(x)||_2, summed over the tokens that chose the expert.",
            by_tag(source.tags, statistics, sums), columns(statistics, source.tags),
        )  # fmt: skip
