"""`topical`: a ranking made elsewhere, such as the domain rankings of GPT-OSS-MoE-ExpertFingerprinting or the study's own scores."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic.dataclasses import dataclass

from softprune.mask_forms import ranking_of
from softprune.ranking.criterion import PARAMETERS, Scored, Source
from softprune.ranking.errors import RankError


@dataclass(frozen=True, config=PARAMETERS)
class Topical:
    """An imported order; the best of E experts scores E, the last 1, and one that the file does not rank 0.

    Attributes:
        section: which of a topical file's two rankings.
    """

    about: ClassVar[str] = "a ranking made elsewhere, such as a domain's of GPT-OSS-MoE-ExpertFingerprinting"
    reads: ClassVar[str] = "ranking"
    section: Literal["think", "answer"] = "think"

    def tensors(self) -> tuple[str, ...]:
        return ()

    def score(self, source: Source) -> Scored:
        if source.ranking is None:
            raise RankError("--ranking", "", "no ranking", "the file with the ranking to import")
        form, rows = ranking_of(source.ranking, source.model, self.section)
        values = np.zeros((source.model.num_layers, source.model.num_experts))
        for layer, row in enumerate(rows):
            values[layer, row] = np.arange(source.model.num_experts, source.model.num_experts - len(row), -1)
        return Scored(values, "imported_rank", f"Place in {source.ranking.name} ({form}), counted from the end.")
