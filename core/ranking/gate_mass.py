"""`gate_mass`: the sum of an expert's gates over the tokens that chose it."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from softprune.ranking.columns import TENSORS, columns
from softprune.ranking.criterion import PARAMETERS, FromStatistics, Scored, Source
from softprune.ranking.tags import by_tag, combine
from softprune.stats.header import Mode


@dataclass(frozen=True, config=PARAMETERS)
class GateMass(FromStatistics):
    """Gates after the softmax over the chosen logits (spec/metrics.md 4: for gpt-oss always so)."""

    about: ClassVar[str] = "sum of an expert's gates"
    mode: ClassVar[Mode] = "router"

    def tensors(self) -> tuple[str, ...]:
        return TENSORS

    def score(self, source: Source) -> Scored:
        statistics = self.statistics(source)
        gates = statistics["router.gate_sum"].sum(1)
        return Scored(
            combine(source.tags, statistics, gates), "gate_sum", "Gates g(x), summed over the tokens that chose the expert.",
            by_tag(source.tags, statistics, gates), columns(statistics, source.tags),
        )  # fmt: skip
