"""`frequency`: how often an expert was chosen (spec/metrics.md 3.3)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from softprune.ranking.columns import TENSORS, columns
from softprune.ranking.criterion import PARAMETERS, FromStatistics, Scored, Source
from softprune.ranking.tags import by_tag, combine
from softprune.stats.header import PHASES, Mode


@dataclass(frozen=True, config=PARAMETERS)
class Frequency(FromStatistics):
    """Selections, of all routed tokens: the study counted prompts, too.

    Attributes:
        phase: "all", "prefill" or "decode".
    """

    about: ClassVar[str] = "how often an expert was chosen"
    mode: ClassVar[Mode] = "router"
    phase: Literal["all", "prefill", "decode"] = "all"

    def tensors(self) -> tuple[str, ...]:
        return TENSORS

    def score(self, source: Source) -> Scored:
        statistics = self.statistics(source)
        count = statistics["router.count"]
        chosen = count.sum(1) if self.phase == "all" else count[:, PHASES.index(self.phase)]
        return Scored(
            combine(source.tags, statistics, chosen), "count", "Selections, summed over tokens.",
            by_tag(source.tags, statistics, chosen), columns(statistics, source.tags),
        )  # fmt: skip
