"""Scores of all experts of a model, and where they come from: what selection needs, so that another budget needs no new statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.mask import MaskModel
from softprune.ranking.criterion import Values
from softprune.stats.figures import ranking


@dataclass(frozen=True, eq=False)
class Scores:
    """What a ranking found.

    Attributes:
        method: name of the criterion.
        model: whose experts they are.
        values: float64 [num_layers, num_experts]; higher is better.
        score_key, definition: what the numbers are.
        parameters: of the criterion and of the tags, JSON-ready.
        inputs: what was read, JSON-ready, e.g. files and their SHA-256.
        found: what the criterion found on its way, JSON-ready.
        columns: further quantities by name, [num_layers, num_experts].
        by_tag: the same quantity of single tags.
        source: the file's name, for errors.
        digest: "sha256:…" of the file that they were read from or written to; None before.
    """

    method: str
    model: MaskModel
    values: Values
    score_key: str
    definition: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    by_tag: Mapping[str, Values] = field(default_factory=dict)
    source: str = "scores"
    digest: str | None = None

    @property
    def ranking(self) -> NDArray[np.int64]:
        """Expert ids [num_layers, num_experts], best first; equal ones by id."""
        return ranking(self.values)
