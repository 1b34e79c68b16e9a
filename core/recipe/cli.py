"""`softprune run`, `softprune lock` and `softprune prune`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softprune.control import ENGINE_KEY_ENV
from softprune.errors import InputError
from softprune.ranking.cli import parameters_of, tag_weights
from softprune.ranking.registry import CRITERIA
from softprune.recipe import run as running
from softprune.recipe.lock import lock_path
from softprune.recipe.prune import COMPRESSION_RATIO, collected, prune
from softprune.recipe.read import read_recipe
from softprune.recipe.run import Places
from softprune.report.progress import tensor_progress
from softprune.selection.select import Protect, Union
from softprune.server_client import ServerClient

console = Console(highlight=False)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe: ours, or one of the study's two shapes.")]
Model = Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint folder; else the recipe's source.model_path.")]
Stats = Annotated[list[Path] | None, typer.Option("--stats", help="Statistics file, once for each; else the recipe's.")]
Ranking = Annotated[Path | None, typer.Option(help="For topical: the file with the ranking; else the recipe's.")]
Variant = Annotated[str | None, typer.Option(help="Which of a recipe's variants, where it has several.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder to make; else one of the recipe's name beside it.")]


def run_command(
    recipe: RecipeFile,
    model: Model = None,
    stats: Stats = None,
    ranking: Ranking = None,
    out: Out = None,
    variant: Variant = None,
    url: Annotated[str | None, typer.Option(help="Carry the recipe out on this server, which runs with --softprune-stats.")] = None,
    packs: Annotated[list[Path] | None, typer.Option(metavar="PACK.parquet", help="With --url: collect from it; once for each.")] = None,
    eval_packs: Annotated[
        list[Path] | None, typer.Option(metavar="PACK.parquet", help="With --url: judge on it; once for each; else on --packs.")
    ] = None,
    seq_lens: Annotated[str | None, typer.Option(metavar="L,L…", help="Of evaluations; else the recipe's, else 1024,2048.")] = None,
    num_blocks: Annotated[int | None, typer.Option(min=1, help="Of each pack at each length; else the recipe's, else 512.")] = None,
    collect_seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a block that is collected from.")] = 1024,
    collect_blocks: Annotated[int | None, typer.Option(min=1, help="Blocks of each pack to collect from; else all that it fills.")] = None,
    gates: Annotated[str, typer.Option(help="Thresholds: a name or a file.")] = "near-lossless-v1",
    concurrency: Annotated[int, typer.Option(min=1, help="Blocks at once in evaluations.")] = 8,
    rewritten_url: Annotated[str | None, typer.Option(help="A server of the rewritten checkpoint; else one is started here.")] = None,
    engine: Annotated[str | None, typer.Option(help="Which: vllm or sglang; else the one that is installed.")] = None,
    engine_args: Annotated[str, typer.Option(help="Further arguments of its command line.")] = "",
    rewrite_anyway: Annotated[bool, typer.Option("--rewrite-anyway", help="Also if the mask does not pass its gate.")] = False,
    key: Annotated[str | None, typer.Option(help="softprune's key, where it cannot be found.")] = None,
    engine_key: Annotated[str | None, typer.Option(envvar=ENGINE_KEY_ENV, help="The engine's own API key.")] = None,
) -> None:
    """Go from statistics to a verified checkpoint, and say what was there already.

    Scores and mask are written beside the checkpoint (OUT.scores.yaml, OUT.mask.json). A lockfile beside the recipe is obeyed; if there is
    none, one is written.

    With --url, statistics are collected through the running server, the mask is put in force there and judged against the server without
    one, and the rewritten checkpoint is served, judged as well, and its routing collected. A mask that does not PASS is taken back, and
    nothing is rewritten. Exits as `softprune gate` does.
    """
    errors = Console(stderr=True)
    if url is None:
        read = read_recipe(recipe, variant)
        places = Places.of(read, recipe, model, out, tuple(stats or ()), ranking)
        if packs or eval_packs or rewritten_url:
            raise InputError("--url", "", "nothing, with options that need it", "a server")
        with tensor_progress(None, errors) as progress:
            running.run(read, places, _tell, progress)
        return
    from softprune.evaluate import eval_packs as pack_module  # Transformers, which takes a second to import
    from softprune.evaluate import gates as gates_module
    from softprune.evaluate.eval_recipe import seq_lens_of
    from softprune.evaluate.evaluate import EvalSettings
    from softprune.evaluate.gate_cli import exits_as_gate
    from softprune.recipe.live import Live, run_live
    from softprune.stats.collect_packs import load

    with exits_as_gate(errors):
        read = read_recipe(recipe, variant)
        places = Places.of(read, recipe, model, out, tuple(stats or ()), ranking)
        regime = read.eval_regime
        lengths = seq_lens_of(seq_lens or regime.get("seq_lens_csv") or "1024,2048")
        sizes = pack_module.Sizes(lengths, num_blocks or regime.get("num_blocks", 512))
        with errors.status("packs"):
            calibration = load(packs or [], str(places.model), collect_seq_len, collect_blocks)
            scored = pack_module.load(eval_packs or packs or [], str(places.model), sizes)
        client, other = ServerClient(url, key, engine_key=engine_key), None
        if rewritten_url is not None:
            other = ServerClient(rewritten_url, key, engine_key=engine_key)
        settings = EvalSettings(concurrency=concurrency)
        live = Live(
            client, calibration, scored, settings, gates_module.read(gates), other, engine, shlex.split(engine_args), rewrite_anyway
        )  # fmt: skip
        results = run_live(read, places, live, _tell, errors)
    raise typer.Exit(max(result.exit_code for result in results))


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
