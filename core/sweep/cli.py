"""`softprune sweep`: many masks on servers that run, one after another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from softprune.control import ENGINE_KEY_ENV
from softprune.errors import InputError
from softprune.options import whole_numbers
from softprune.server_client import ServerClient

console = Console(highlight=False)


def sweep_command(
    url: Annotated[list[str], typer.Option(help="Server with --softprune-control; once more for one with another top_k.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for evaluations, gates and sweep.json.")],
    packs: Annotated[list[Path] | None, typer.Option(metavar="PACK.parquet", help="Conversations to score; once for each.")] = None,
    scores: Annotated[list[Path] | None, typer.Option(help="Scores file; once for each.")] = None,
    stats: Annotated[list[Path] | None, typer.Option(help="Statistics to rank by, with --method; once for each file.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="With --stats, a criterion; once for each.")] = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="NAME=V,V…", help="With --stats, values of a parameter, e.g. w_conflict=-2,-1,-0.5.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="TAG[=WEIGHT]", help="With --stats, count only this tag, so much.")] = None,
    keep: Annotated[str | None, typer.Option(metavar="N,N…", help="Experts that stay in each layer; with scores or statistics.")] = None,
    core_mass: Annotated[int, typer.Option(min=0, help="So many with the largest positive mass stay in any case.")] = 0,
    core_count: Annotated[int, typer.Option(min=0, help="So many that were chosen most often stay in any case.")] = 0,
    tag_top: Annotated[int, typer.Option(min=0, help="Of each tag, so many of its best stay in any case.")] = 0,
    random_seeds: Annotated[str | None, typer.Option(metavar="N,N…", help="Random pruning as well, with these seeds.")] = None,
    masks: Annotated[list[Path] | None, typer.Option(help="Mask file instead of scores; once for each.")] = None,
    seq_lens: Annotated[str, typer.Option(metavar="L,L…", help="Tokens in a block.")] = "1024,2048",
    num_blocks: Annotated[int, typer.Option(min=1, help="Blocks of each pack at each length.")] = 512,
    token_budget: Annotated[int | None, typer.Option(min=1, metavar="N", help="Instead, tokens of each pack at each length.")] = None,
    data_seeds: Annotated[
        str | None, typer.Option(metavar="N,N…", help="Orders of the packs' rows, each with a base of its own; else the files' own.")
    ] = None,
    no_union: Annotated[bool, typer.Option("--no-union", help="Leave out UNION, one conversation of each pack in turn.")] = False,
    tokenizer: Annotated[str | None, typer.Option(metavar="DIR", help="Else that of the served model.")] = None,
    gates: Annotated[str, typer.Option(help="Thresholds: a name or a file.")] = "near-lossless-v1",
    concurrency: Annotated[int, typer.Option(min=1, help="Blocks at once.")] = 8,
    decode_batch: Annotated[int, typer.Option(min=0, help="Requests at once while decoding is timed; 0 times nothing.")] = 8,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Length of their answers.")] = 128,
    decode_repeats: Annotated[int, typer.Option(min=1, help="Pairs of passes, mask beside no mask; fewer than 3 give no interval.")] = 3,
    key: Annotated[str | None, typer.Option(help="softprune's key, where it cannot be found.")] = None,
    engine_key: Annotated[str | None, typer.Option(envvar=ENGINE_KEY_ENV, help="The engine's own API key.")] = None,
) -> None:
    """Evaluate, gate and time many masks on running servers; each has its own mask again at the end, whatever happens.

    Interrupted, the same command goes on where it was.
    """
    from softprune.evaluate import eval_packs  # Transformers, which takes a second to import
    from softprune.evaluate import gates as gates_module
    from softprune.evaluate.eval_recipe import seq_lens_of
    from softprune.evaluate.evaluate import EvalSettings
    from softprune.evaluate.served import ask_served
    from softprune.report.progress import count_progress
    from softprune.selection.select import Protect
    from softprune.sweep.decode import Decode
    from softprune.sweep.sweep import Settings, Sweep
    from softprune.sweep.table import table

    clients = [ServerClient(one, key, engine_key=engine_key) for one in url]
    protect = Protect(core_mass, core_count, "none", tag_top)
    cells = _cells(scores or (), stats or (), method or (), grid or (), tag or (), keep, protect, random_seeds, masks or ())
    rules = gates_module.read(gates)
    sizes = eval_packs.Sizes(seq_lens_of(seq_lens), num_blocks, token_budget)
    seeds: list[int | None] = list(whole_numbers("--data-seeds", data_seeds, "0,1,2")) if data_seeds else [None]
    path = tokenizer or ask_served(clients[0]).tokenizer
    errors = Console(stderr=True)
    with errors.status("packs"):
        cut = {seed: eval_packs.load(packs or [], path, sizes, not no_union, data_seed=seed) for seed in seeds}
    decode = Decode(decode_batch, max_new_tokens=decode_tokens, repeats=decode_repeats) if decode_batch else None
    run = Sweep(clients, cells, cut, out, Settings(rules, EvalSettings(concurrency=concurrency), decode), tell=_tell)
    with count_progress("evaluations", run.num_jobs, errors) as advance:
        document = run.run(advance)
    console.print(table(document))
    _tell(f"{out}: {len(cells)} masks; softprune report {out} -o report.html shows them")


def _cells(
    scores: Sequence[Path], stats: Sequence[Path], methods: Sequence[str], grid: Sequence[str], tags: Sequence[str], keep: str | None,
    protect: Any, random_seeds: str | None, masks: Sequence[Path],
) -> list[Any]:  # fmt: skip
    """The masks that the options ask for."""
    from softprune.mask import load
    from softprune.ranking import scores_file
    from softprune.ranking.cli import tag_weights
    from softprune.selection.select import Protect
    from softprune.sweep.cells import of_files, of_masks, of_rankings, of_statistics

    if masks:
        if scores or stats or keep or methods or grid or tags or random_seeds or protect != Protect():
            raise InputError("--masks", "", "options that choose experts as well", "one of the two ways")
        return of_masks([(file.stem, load(file)) for file in masks])
    if keep is None or not (scores or stats):
        raise InputError("sweep", "", "no masks", "--masks, or --keep with --scores or with --stats and --method")
    if bool(stats) != bool(methods) or (not stats and (grid or tags)):
        raise InputError("--stats", "", "without --method, or --method, --grid or --tag without it", "--stats and --method together")
    values = {name: [_value(one) for one in texts.split(",")] for name, _, texts in (text.partition("=") for text in grid)}
    rankings = of_files([scores_file.read(file) for file in scores])
    if stats:
        rankings += of_statistics(stats, methods, values, tag_weights(tags))
    seeds = whole_numbers("--random-seeds", random_seeds, "0,1") if random_seeds else []
    return of_rankings(rankings, whole_numbers("--keep", keep, "28,24,20"), protect, seeds)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _tell(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False)
