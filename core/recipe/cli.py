"""`softprune run`, `softprune lock` and `softprune prune`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softprune.ranking.cli import parameters_of, tag_weights
from softprune.ranking.registry import CRITERIA
from softprune.recipe import run as running
from softprune.recipe.lock import lock_path
from softprune.recipe.prune import COMPRESSION_RATIO, collected, prune
from softprune.recipe.read import read_recipe
from softprune.recipe.run import Places
from softprune.report.progress import tensor_progress
from softprune.selection.select import Protect, Union

console = Console(highlight=False)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe: ours, or one of the study's two shapes.")]
Model = Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint folder; else the recipe's source.model_path.")]
Stats = Annotated[list[Path] | None, typer.Option("--stats", help="Statistics file, once for each; else the recipe's.")]
Ranking = Annotated[Path | None, typer.Option(help="For topical: the file with the ranking; else the recipe's.")]
Variant = Annotated[str | None, typer.Option(help="Which of a recipe's variants, where it has several.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder to make; else one of the recipe's name beside it.")]


def run_command(
    recipe: RecipeFile, model: Model = None, stats: Stats = None, ranking: Ranking = None, out: Out = None, variant: Variant = None
) -> None:
    """Go from statistics to a verified checkpoint, and say what was there already.

    Scores and mask are written beside the checkpoint (OUT.scores.yaml, OUT.mask.json). A lockfile beside the recipe is obeyed; if there is
    none, one is written.
    """
    read = read_recipe(recipe, variant)
    places = Places.of(read, recipe, model, out, tuple(stats or ()), ranking)
    with tensor_progress(None, Console(stderr=True)) as progress:
        running.run(read, places, _tell, progress)


def lock_command(
    recipe: RecipeFile, model: Model = None, stats: Stats = None, ranking: Ranking = None, out: Out = None, variant: Variant = None
) -> None:
    """Pin what a recipe depends on and what it makes: model, statistics, data, parameters, versions, outputs."""
    read = read_recipe(recipe, variant)
    places = Places.of(read, recipe, model, out, tuple(stats or ()), ranking)
    with tensor_progress(None, Console(stderr=True)) as progress:
        found = running.lock(read, places, _tell, progress)
    made = "checkpoint and all" if found["outputs"]["manifest"] else "but for the checkpoint, which is not there yet"
    _tell(f"lock: {lock_path(recipe)}, {made}")


def prune_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint folder: gpt-oss (MXFP4 or BF16), Qwen3-MoE or Mixtral.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(CRITERIA)}.")] = "reap",
    compression_ratio: Annotated[
        str | None, typer.Option(help=f"Share of the experts that goes, as in REAP; {COMPRESSION_RATIO} if nothing is said.")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Or: experts that stay in each layer.")] = None,
    keep_frac: Annotated[str | None, typer.Option(help="Or: share of the experts that stays.")] = None,
    stats: Annotated[list[Path] | None, typer.Option("--stats", help="Statistics file, once for each.")] = None,
    packs: Annotated[
        list[Path] | None, typer.Option("--packs", help="Or: pack (Parquet) to collect them from by the engine installed, once for each.")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="With --packs, tokens in a block.")] = 1024,
    num_blocks: Annotated[int | None, typer.Option(min=1, help="With --packs, blocks of each; else all that it fills.")] = None,
    engine: Annotated[str | None, typer.Option(help="With --packs: vllm or sglang; else the one that is installed.")] = None,
    engine_args: Annotated[str, typer.Option(help="With --packs: further arguments of the engine's command line.")] = "",
    ranking: Annotated[Path | None, typer.Option(help="For topical: the file with the ranking.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="TAG[=WEIGHT]", help="Count only this tag, so much; once for each.")] = None,
    normalise_tags: Annotated[bool, typer.Option(help="Give every tag the same say, whatever its number of tokens.")] = False,
    param: Annotated[list[str] | None, typer.Option("--param", "-p", metavar="NAME=VALUE", help="Parameter of the method.")] = None,
    keep_multiple: Annotated[int | None, typer.Option(help="The number has to be a multiple of this.")] = None,
    core_mass: Annotated[int, typer.Option(min=0, help="So many with the largest positive mass stay in any case.")] = 0,
    core_count: Annotated[int, typer.Option(min=0, help="So many that were chosen most often stay in any case.")] = 0,
    tag_top: Annotated[int, typer.Option(min=0, help="Of each tag, so many of its best stay in any case.")] = 0,
    union: Annotated[float | None, typer.Option(min=0, max=1, metavar="COVERAGE", help="Of each tag, what holds this share of it.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The base model's Hub name, for the card; else guessed from MODEL's path.")] = None,
) -> None:
    """Rank, select, rewrite and verify in one go; the recipe of it lies beside the checkpoint, and in it."""
    errors = Console(stderr=True)
    files = list(stats or ())
    if packs:
        collect = {"seq_len": seq_len, "num_blocks": num_blocks, "engine": engine, "engine_args": shlex.split(engine_args)}
        # Before the other bar, since two cannot be drawn at once.
        files.append(collected(model, out, packs, method, files, tell=_tell, console=errors, **collect))
    with tensor_progress(None, errors) as progress:
        prune(
            model, out, method, keep=keep, keep_frac=keep_frac, compression_ratio=compression_ratio, stats=files, ranking=ranking,
            tags=tag_weights(tag or ()), normalise_tags=normalise_tags, keep_multiple=keep_multiple,
            protect=Protect(core_mass, core_count, "none", tag_top), union=None if union is None else Union(union), base_model=base_model,
            tell=_tell, progress=progress, **parameters_of(param or ()),
        )  # fmt: skip


def _tell(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False)
