"""The masks of a sweep: made of scores and numbers of experts, or given."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprune.errors import InputError
from softprune.mask import ExpertMask
from softprune.ranking.api import rank
from softprune.ranking.scores import Scores
from softprune.selection.select import Protect, select


@dataclass(frozen=True)
class Cell:
    """A mask to be measured.

    Attributes:
        label: what people call it, e.g. "reap keep 24"; unique in a sweep.
        mask: to be put in force.
        method: criterion that it was made by; None for a mask that was given.
        keep: experts that each layer keeps; None where layers differ.
        seed: of random pruning, else None.
    """

    label: str
    mask: ExpertMask
    method: str | None = None
    keep: int | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """The label as part of a file's name."""
        return re.sub(r"[^A-Za-z0-9_.]+", "-", self.label).strip("-.") or "mask"


Ranking = tuple[str, Scores]
"""A label and scores."""


def of_files(scores: Sequence[Scores]) -> list[Ranking]:
    """Scores files, by method, and by the file's name where two are of one method."""
    methods = [one.method for one in scores]
    names = [Path(one.source).name.split(".")[0] for one in scores]
    return [
        (one.method if methods.count(one.method) == 1 else f"{one.method} ({name})", one) for one, name in zip(scores, names, strict=True)
    ]  # fmt: skip


def of_statistics(
    stats: Sequence[Path], methods: Sequence[str], grid: Mapping[str, Sequence[Any]], tags: Mapping[str, float]
) -> list[Ranking]:
    """Rankings by statistics that are there: each method with every combination of the grid's values.

    Args:
        stats: statistics files.
        methods: criteria.
        grid: values by name of the criteria's parameters, e.g. {"w_conflict": [-2.0, -1.0]}; all methods have to know them.
        tags: as `softprune.rank` takes them.

    Raises:
        SoftpruneError: as `softprune.rank`.
    """
    found = []
    for method in methods:
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            label = " ".join(
                [method, *(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in chosen.items())]
            )
            found.append((label, rank(list(stats), method, tags=dict(tags), **chosen)))
    return found


def of_rankings(
    rankings: Sequence[Ranking], keeps: Sequence[int], protect: Protect | None = None, random_seeds: Iterable[int] = ()
) -> list[Cell]:
    """One mask for each ranking and number kept, and random ones of the same numbers.

    Args:
        rankings: of one model.
        keeps: numbers of experts that stay in each layer.
        protect: as `select` takes it; not for random pruning.
        random_seeds: of `random`, once for each number kept.

    Raises:
        InputError: scores of different models, or none and random seeds.
        MaskError: a number that cannot be met.
    """
    seeds = list(random_seeds)
    models = {one.model.fingerprint: label for label, one in rankings}
    if len(models) > 1:
        raise InputError("--scores", "", f"scores of different models: {', '.join(models.values())}", "scores of the served one")
    if seeds and not rankings:
        raise InputError("--random-seeds", "", "no scores", "at least one ranking, which says what the model is like")
    cells = [
        Cell(f"{label} keep {keep}", select(one, keep, protect=protect), one.method, keep) for label, one in rankings for keep in keeps
    ]
    for seed in seeds:
        random = rank(method="random", model=rankings[0][1].model, seed=seed)
        cells += [Cell(f"random keep {keep} seed {seed}", select(random, keep), "random", keep, seed) for keep in keeps]
    return _distinct(cells)


def of_masks(masks: Sequence[tuple[str, ExpertMask]]) -> list[Cell]:
    """Masks that were given, by (label, mask)."""
    found = []
    for label, mask in masks:
        counts, method = set(mask.num_kept), (mask.provenance or {}).get("method")
        found.append(Cell(label, mask, method if isinstance(method, str) else None, counts.pop() if len(counts) == 1 else None))
    return _distinct(found)


_TAKEN = {"base", "unmasked", "sweep", "masks"}
"""Names of a sweep's own files and lines."""
_ENDINGS = (".gate", ".decode")


def _distinct(cells: list[Cell]) -> list[Cell]:
    for cell in cells:
        if cell.name in _TAKEN or cell.name.endswith(_ENDINGS):
            raise InputError("sweep", "label", repr(cell.label), f"a name other than {', '.join(sorted(_TAKEN))}, *.gate and *.decode")
    for kind, names in (("label", [cell.label for cell in cells]), ("file name", [cell.name for cell in cells])):
        for name in names:
            if names.count(name) > 1:
                raise InputError("sweep", kind, f"{name!r} twice", "files of different names and methods")
    return cells
