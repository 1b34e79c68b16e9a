"""What a criterion is: parameters, what it reads, and a score for every expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, ValidationError

from softprune.errors import shortened
from softprune.mask import MaskModel
from softprune.ranking.errors import RankError
from softprune.ranking.tags import TagWeights
from softprune.stats.file import Statistics
from softprune.stats.header import Mode

Values = NDArray[np.float64]

PARAMETERS = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""Configuration of the criteria's dataclasses, whose fields are their parameters."""


@dataclass(frozen=True)
class Source:
    """What criteria may read; each says which of these it needs.

    Attributes:
        model: the model whose experts are scored.
        tags: which tags of the statistics count, and how much.
        statistics: with at least the tensors that the criterion names.
        checkpoint: a folder.
        ranking: a file with a ranking made elsewhere.
        progress: told of (tensor name, bytes) while a checkpoint is read.
    """

    model: MaskModel
    tags: TagWeights = field(default_factory=TagWeights)
    statistics: Statistics | None = None
    checkpoint: Path | None = None
    ranking: Path | None = None
    progress: Callable[[str, int], None] | None = None


@dataclass(frozen=True)
class Scored:
    """What a criterion found.

    Attributes:
        values: float64 [num_layers, num_experts]; higher is better, all finite.
        score_key, definition: name of the quantity, and in words how it is made.
        by_tag: the same quantity of single tags, unweighted; {} where there are no tags.
        columns: further quantities [num_layers, num_experts] by name, for reports and for selection.
        found: what the criterion found on its way, JSON-ready, e.g. thresholds.
    """

    values: Values
    score_key: str
    definition: str
    by_tag: Mapping[str, Values] = field(default_factory=dict)
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)


class Criterion(Protocol):
    """One way to score experts; the fields of its frozen dataclass are its parameters."""

    about: ClassVar[str]
    """One line for the command line's help."""
    reads: ClassVar[str]
    """"statistics", "checkpoint", "ranking" or "model"."""

    def tensors(self) -> tuple[str, ...]:
        """Names of the statistics' tensors that it reads."""

    def score(self, source: Source) -> Scored:
        """Score every expert.

        Raises:
            RankError, StatisticsError, CheckpointError, MaskError: what it reads is missing or wrong.
        """


@dataclass(frozen=True)
class FromStatistics:
    """A criterion that reads statistics; `mode` says how they have to be collected."""

    reads: ClassVar[str] = "statistics"
    mode: ClassVar[Mode] = "reap"

    def statistics(self, source: Source) -> Statistics:
        """The statistics.

        Raises:
            RankError: there are none.
        """
        if source.statistics is None:
            raise RankError("--stats", "", "no statistics", "a statistics file, from which this method ranks")
        return source.statistics


def build(name: str, kind: type[Criterion], parameters: Mapping[str, Any]) -> Criterion:
    """A criterion with parameters from a recipe or the command line.

    Raises:
        RankError: an unknown parameter, or a value that it cannot have.
    """
    try:
        return kind(**parameters)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != kind.__name__)
        found = "an unknown parameter" if first["type"] in ("unexpected_keyword_argument", "extra_forbidden") else shortened(first["input"])
        known: list[str] = [one.name for one in fields(kind)] if is_dataclass(kind) else []
        names = f"one of {', '.join(known)}" if known else "none, since it takes no parameters"
        expected = names if found == "an unknown parameter" else first["msg"].removeprefix("Input should be ")
        raise RankError(f"method {name}", place, found, expected) from None
