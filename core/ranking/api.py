"""`softprune.rank`: from statistics, a checkpoint or a foreign ranking to scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from softprune.errors import shortened
from softprune.files import digest_of, digest_of_file
from softprune.mask import MaskModel
from softprune.ranking.criterion import Criterion, Source
from softprune.ranking.errors import RankError
from softprune.ranking.registry import ALIASES, criterion
from softprune.ranking.scores import Scores
from softprune.ranking.tags import TagWeights
from softprune.stats import file as stats_file
from softprune.stats.file import Statistics
from softprune.stats.merge import merge_files

Stats = Statistics | str | Path | Sequence[str | Path]


def rank(
    stats: Stats | None = None,
    method: str = "reap",
    *,
    model: MaskModel | None = None,
    checkpoint: str | Path | None = None,
    ranking: str | Path | None = None,
    tags: Mapping[str, float] | None = None,
    normalise_tags: bool = False,
    progress: Callable[[str, int], None] | None = None,
    **parameters: Any,
) -> Scores:
    """Score every expert of a model.

    Args:
        stats: statistics, a file of them, or several, which are added; for the methods that rank by statistics.
        method: name of the criterion, e.g. "reap"; see `softprune.ranking.registry.CRITERIA`.
        model: the model, where neither statistics nor a checkpoint says it; compared with the statistics' where they do.
        checkpoint: folder of the model, for `weights`; its shape serves the methods that need no more.
        ranking: file of a foreign ranking, for `topical`.
        tags: weights of the tags that count; without it, all alike.
        normalise_tags: give every tag the same say whatever its number of tokens.
        progress: told of (tensor name, bytes) while files are read.
        **parameters: of the criterion.

    Raises:
        RankError: an unknown method or parameter, or what the method reads is missing.
        StatisticsError, CheckpointError, MaskError: a file is not what it should be.
    """
    chosen = criterion(method, parameters)
    weights = TagWeights(dict(tags or {}), normalise_tags)
    if chosen.reads != "statistics" and (weights.weights or normalise_tags):
        raise RankError("tags", "", f"weights of tags for {method}", "none, since this method reads no statistics")
    statistics, inputs = (None, {}) if stats is None or chosen.reads != "statistics" else _statistics(stats, chosen, progress)
    folder = None if checkpoint is None else Path(checkpoint)
    if stats is not None and statistics is None and model is None and folder is None:
        raise RankError("--stats", "", f"statistics for {method}, which reads none", "--model, the model's folder, in their place")
    known = _known_model(statistics, model, folder)
    source = Source(known, weights, statistics, folder, None if ranking is None else Path(ranking), progress)
    found = chosen.score(source)
    if not np.isfinite(found.values).all() or found.values.shape != (known.num_layers, known.num_experts):
        raise RankError(method, "scores", "values that are not finite", "a finite score for every expert")
    if statistics is not None and len(empty := np.flatnonzero(~found.values.any(1))):
        told = f"nothing that {method} ranks by, in MoE layer {empty[0]}" + (f" and {len(empty) - 1} more" if len(empty) > 1 else "")
        raise RankError(statistics.source, "scores", told, "tokens that were counted in all, under the tags and parameters asked for")
    if ranking is not None and chosen.reads == "ranking":
        inputs = {"ranking": {"file": Path(ranking).name, "sha256": digest_of_file(Path(ranking))}}
    return Scores(
        ALIASES.get(method, method), known, found.values, found.score_key, found.definition,
        parameters_said(chosen, weights), inputs, found.found, found.columns, found.by_tag,
    )  # fmt: skip


def parameters_said(chosen: Criterion, tags: TagWeights) -> dict[str, Any]:
    """All parameters of a ranking, defaults too, as a scores file holds them."""
    own: dict[str, Any] = asdict(chosen) if is_dataclass(chosen) and not isinstance(chosen, type) else {}
    return {**own, "tags": dict(tags.weights), "normalise_tags": tags.normalise}


def model_of_checkpoint(folder: Path) -> MaskModel:
    """The shape and fingerprint of a checkpoint, as masks name them.

    Raises:
        CheckpointError: it cannot be read.
    """
    from softprune.checkpoint.families import read_config, spec_of
    from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint

    spec = spec_of(read_config(folder), str(folder / "config.json"))
    return MaskModel.of(spec, fingerprint_of_checkpoint(folder))


def _statistics(stats: Stats, chosen: Criterion, progress: Callable[[str, int], None] | None) -> tuple[Statistics, dict[str, Any]]:
    """The statistics with the tensors that are needed, and what to say of them."""
    if isinstance(stats, Statistics):
        return stats, {"statistics": [_described(stats)]}
    paths = [Path(stats)] if isinstance(stats, (str, Path)) else [Path(path) for path in stats]
    if not paths:
        raise RankError("--stats", "", "no file", "at least one statistics file")
    hashes = [{"file": path.name, "sha256": digest_of_file(path)} for path in paths if path.is_file()]
    if len(paths) == 1:
        statistics = stats_file.read(paths[0], set(chosen.tensors()))
    else:
        statistics = replace(merge_files(paths, progress), source=f"{len(paths)} statistics files")
    return statistics, {"statistics": hashes, **_described(statistics)}


def _described(statistics: Statistics) -> dict[str, Any]:
    header = statistics.header
    return {
        "runs": [run.id for run in header.runs],
        "mask": header.epochs[0].mask,
        "routed_tokens": {tag: tokens.routed for tag, tokens in header.tokens.items()},
        # A replayed pack has a hash for each block; all of them are in the statistics.
        "data_sets": [
            {"id": one.id, "num_hashes": len(one.hashes), "sha256": digest_of("\n".join(sorted(one.hashes)).encode())}
            for one in header.data_sets
        ],
    }


def _known_model(statistics: Statistics | None, model: MaskModel | None, folder: Path | None) -> MaskModel:
    given = model if model is not None or folder is None else model_of_checkpoint(folder)
    if statistics is None:
        if given is None:
            raise RankError("--model", "", "no model", "the model's folder, or statistics of it")
        return given
    own = statistics.header.model
    if given is not None and (field := next((f for f, v in own.model_dump().items() if v != getattr(given, f)), None)):
        if field == "fingerprint" and given.fingerprint is None:
            return own
        found = shortened(getattr(own, field))
        raise RankError(statistics.source, f"model.{field}", found, f"{getattr(given, field)}, as the model has")
    return own
