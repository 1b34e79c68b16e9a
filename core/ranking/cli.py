"""`softprune rank`: from statistics, a checkpoint or a foreign ranking to a scores file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from softprune.files import check_apart
from softprune.ranking import scores_file
from softprune.ranking.api import rank
from softprune.ranking.errors import RankError
from softprune.ranking.registry import CRITERIA
from softprune.ranking.scores import Scores
from softprune.report.progress import tensor_progress
from softprune.stats.figures import effective_number, overlap

console = Console(highlight=False)
_METHODS = "; ".join(f"[bold]{name}[/]: {kind.about}" for name, kind in CRITERIA.items())


def rank_command(
    stats: Annotated[
        list[Path] | None, typer.Argument(metavar="[STATS…]", help="Statistics files of one model; several are added.")
    ] = None,
    method: Annotated[str, typer.Option(help=_METHODS)] = "reap",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Scores file (YAML) to write.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Checkpoint folder: for weights and random; else compared with the statistics.")
    ] = None,
    ranking: Annotated[Path | None, typer.Option(help="For topical: the file with the ranking.")] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="TAG[=WEIGHT]", help="Count only this tag, so much; once for each. Without it, all alike.")
    ] = None,
    normalise_tags: Annotated[bool, typer.Option(help="Give every tag the same say, whatever its number of tokens.")] = False,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", metavar="NAME=VALUE", help="Parameter of the method, e.g. rule=policy.")
    ] = None,
) -> None:
    """Score every expert: from statistics, or from a checkpoint or a foreign ranking alone."""
    if out is not None:
        check_apart(out, [*(stats or ()), ranking])
    size = sum(file.stat().st_size for file in stats or () if file.is_file())
    with tensor_progress(size or None, Console(stderr=True)) as progress:
        scores = rank(
            stats or None, method, checkpoint=model, ranking=ranking, tags=tag_weights(tag or ()), normalise_tags=normalise_tags,
            progress=progress, **parameters_of(param or ()),
        )  # fmt: skip
    if out is not None:
        scores = scores_file.write(scores, out)
    console.print(shown(scores))
    text = f"{out}: " if out is not None else ""
    console.print(f"{text}{scores.method}, {scores.score_key}: {scores.definition}", soft_wrap=True, markup=False)
    if scores.inputs.get("mask") is not None:
        console.print(
            "[yellow]warning:[/] collected under a mask: experts that it pruned could not be chosen, and rank last", soft_wrap=True
        )
    if scores.found:
        console.print(json.dumps(scores.found), soft_wrap=True, markup=False)


def shown(scores: Scores) -> Table:
    """One row for each layer: the best and worst experts, and how the scores are spread."""
    half = scores.model.num_experts // 2
    table = Table("layer", "best", "worst", "effective number", box=None)
    agrees = scores.columns.get("count") if scores.method != "frequency" else None
    if agrees is not None:
        table.add_column(f"top {half} that frequency has, too")
        shares = overlap(scores.values, agrees, half)
    numbers = effective_number(scores.values.clip(0))
    for layer, order in enumerate(scores.ranking.tolist()):
        row = [str(layer), *(", ".join(map(str, ids)) for ids in (order[:6], order[-6:])), f"{numbers[layer]:.1f}"]
        table.add_row(*row, *([] if agrees is None else [f"{shares[layer]:.0%}"]))
    return table


def tag_weights(given: Sequence[str]) -> dict[str, float]:
    """Weights by tag of "NAME" or "NAME=WEIGHT".

    Raises:
        RankError: a weight that is not a number, or a tag given twice.
    """
    found: dict[str, float] = {}
    for text in given:
        tag, _, weight = text.rpartition("=") if "=" in text else (text, "", "1")
        try:
            number = float(weight)
        except ValueError:
            raise RankError("--tag", tag, weight, "a number after the last =") from None
        if tag in found:
            raise RankError("--tag", tag, "this tag twice", "each tag once")
        found[tag] = number
    return found


def parameters_of(given: Sequence[str]) -> dict[str, Any]:
    """Parameters of "NAME=VALUE"; a value that is JSON is what it says, any other is text.

    Raises:
        RankError: no "=", or a parameter given twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or name in found:
            raise RankError("--param", name, text, "NAME=VALUE, each name once")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
