"""`ean`: the norm of an expert's output without its gate, which arXiv 2606.15716 found to generalise better than REAP."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from softprune.ranking.columns import TENSORS, columns
from softprune.ranking.criterion import PARAMETERS, FromStatistics, Scored, Source
from softprune.ranking.tags import by_tag, combine


@dataclass(frozen=True, config=PARAMETERS)
class Ean(FromStatistics):
    """Expert activation norm.

    Attributes:
        form: "mean" over the tokens that chose the expert (REAP's code: ean_mean), or their "sum" (ean_sum).
    """

    about: ClassVar[str] = "mean output norm, without the gate"
    form: Literal["mean", "sum"] = "mean"

    def tensors(self) -> tuple[str, ...]:
        return TENSORS

    def score(self, source: Source) -> Scored:
        statistics = self.statistics(source)
        sums, count = statistics["reap.norm_sum"], statistics["reap.count"] if self.form == "mean" else None
        return Scored(
            combine(source.tags, statistics, sums, count), f"norm_{self.form}",
            f"{self.form.capitalize()} of ||f(x)||_2 over the tokens that chose the expert.",
            by_tag(source.tags, statistics, sums, count), columns(statistics, source.tags),
        )  # fmt: skip
