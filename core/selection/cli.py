"""`softprune select`: from a scores file to a mask."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softprune.files import check_apart
from softprune.ranking import scores_file
from softprune.ranking.api import model_of_checkpoint
from softprune.report.keep_map import keep_map
from softprune.selection.budget import BACKEND_MULTIPLES
from softprune.selection.select import Protect, Union, select

console = Console(highlight=False)


class Rounding(str, Enum):
    """Of a share of the experts."""

    ceil = "ceil"
    floor = "floor"
    round = "round"


class ByLayer(str, Enum):
    """Whether layers keep the same number."""

    uniform = "uniform"
    neff = "neff"


class Target(str, Enum):
    """What the mask is for."""

    mask = "mask"
    checkpoint = "checkpoint"


class SuperExperts(str, Enum):
    """Which experts with outlying activations stay."""

    none = "none"
    super = "super"
    outliers = "outliers"


def select_command(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="Scores file, of ours or of the study's.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Mask file to write.")],
    keep: Annotated[int | None, typer.Option(help="Experts that stay in each layer; with --union, at most.")] = None,
    keep_frac: Annotated[str | None, typer.Option(help="Share of the experts that stays, e.g. 0.75.")] = None,
    compression_ratio: Annotated[str | None, typer.Option(help="Share of the experts that goes, as in REAP.")] = None,
    rounding: Annotated[Rounding, typer.Option(help="Of --keep-frac.")] = Rounding.ceil,
    keep_multiple: Annotated[
        int | None, typer.Option(help="The number has to be a multiple of this; without it, what --backend needs, else 1.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help=f"MoE backend of the smaller model; known to need a multiple: {', '.join(BACKEND_MULTIPLES)}.")
    ] = None,
    by_layer: Annotated[ByLayer, typer.Option(help="All layers alike, or more for those with more effective experts.")] = ByLayer.uniform,
    minimum: Annotated[int | None, typer.Option("--min", help="In any layer, with --by-layer neff.")] = None,
    maximum: Annotated[int | None, typer.Option("--max", help="In any layer, with --by-layer neff.")] = None,
    core_mass: Annotated[int, typer.Option(min=0, help="So many with the largest positive mass stay in any case.")] = 0,
    core_count: Annotated[int, typer.Option(min=0, help="So many that were chosen most often stay in any case.")] = 0,
    super_experts: Annotated[SuperExperts, typer.Option(help="Experts with outlying activations stay, as in REAP.")] = SuperExperts.none,
    tag_top: Annotated[int, typer.Option(min=0, help="Of each tag, so many of its best stay in any case.")] = 0,
    union: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="COVERAGE", help="Of each tag, the best that hold this share of its mass.")
    ] = None,
    union_core: Annotated[int, typer.Option(min=0, help="With --union, so many of the best of all tags together stay.")] = 4,
    raw_union: Annotated[bool, typer.Option(help="Add the tags' masses as they are, as the study did.")] = False,
    target: Annotated[Target, typer.Option(help="What the mask is for: a checkpoint needs uniform layers.")] = Target.mask,
    top_k: Annotated[int | None, typer.Option(help="Experts per token; without it, the model's own.")] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="Checkpoint folder; for scores that don't name their model, else compared with them."),
    ] = None,
) -> None:
    """Choose the experts that stay; the mask's provenance tells why each does."""
    check_apart(out, [scores])
    found = scores_file.read(scores, None if model is None else model_of_checkpoint(model))
    mask = select(
        found, keep, keep_frac=keep_frac, compression_ratio=compression_ratio, rounding=rounding.value, keep_multiple=keep_multiple,
        backend=backend, by_layer=by_layer.value, minimum=minimum, maximum=maximum,
        protect=Protect(core_mass, core_count, super_experts.value, tag_top),
        union=None if union is None else Union(union, union_core, not raw_union), target=target.value, top_k=top_k,
    )  # fmt: skip
    mask.save(out)
    console.print(keep_map(mask, console.width))
    console.print(f"{out}: {mask.summary} by {found.method}, {mask.hash[:19]}…", soft_wrap=True, markup=False)
