"""`random`: the baseline that every criterion has to beat."""

from __future__ import annotations

import random
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from softprune.ranking.criterion import PARAMETERS, Scored, Source


@dataclass(frozen=True, config=PARAMETERS)
class Random:
    """Uniform numbers, drawn layer by layer and expert by expert.

    Attributes:
        seed: same seed, same scores, on every machine.
    """

    about: ClassVar[str] = "uniform numbers"
    reads: ClassVar[str] = "model"
    seed: Annotated[int, Field(ge=0)] = 0

    def tensors(self) -> tuple[str, ...]:
        return ()

    def score(self, source: Source) -> Scored:
        rng = random.Random(f"softprune.rank/{self.seed}")
        values = [[rng.random() for _ in range(source.model.num_experts)] for _ in range(source.model.num_layers)]
        return Scored(np.array(values), "uniform", f"Uniform numbers, seed {self.seed}.")
