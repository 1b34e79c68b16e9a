"""`reap`: mean over the tokens that chose an expert of gate times output norm (REAP, arXiv 2510.13999; spec/metrics.md 3.2 and 4)."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from softprune.ranking.columns import TENSORS, columns
from softprune.ranking.criterion import PARAMETERS, FromStatistics, Scored, Source
from softprune.ranking.tags import by_tag, combine


@dataclass(frozen=True, config=PARAMETERS)
class Reap(FromStatistics):
    """g is renormalised over the chosen experts, f the expert's output before its gate, with biases."""

    about: ClassVar[str] = "mean of gate x output norm over the tokens that chose the expert (REAP)"

    def tensors(self) -> tuple[str, ...]:
        return TENSORS

    def score(self, source: Source) -> Scored:
        statistics = self.statistics(source)
        sums, count = statistics["reap.gate_norm_sum"], statistics["reap.count"]
        return Scored(
            combine(source.tags, statistics, sums, count), "saliency_mean",
            "Mean of g(x) * ||f(x)||_2 over the tokens that chose the expert.",
            by_tag(source.tags, statistics, sums, count), columns(statistics, source.tags),
        )  # fmt: skip
