"""`softprune stats …`: statistics files, added, shown, compared and exported."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from softprune.control import ENGINE_KEY_ENV
from softprune.errors import InputError, shortened
from softprune.files import check_apart, replaced_after
from softprune.report.progress import count_progress, tensor_progress
from softprune.server_client import ServerClient
from softprune.stats import merge as merging
from softprune.stats import plots, tables
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics, read, read_header, write
from softprune.stats.layout import SPECS
from softprune.stats.summary import compare, describe, needed

stats_app = typer.Typer(
    help="Collect statistics on a running server; add, show, compare and export their files.", no_args_is_help=True, rich_markup_mode="rich"
)
console = Console(highlight=False)


class ModeName(str, Enum):
    """What a server can be asked to collect."""

    router = "router"
    reap = "reap"
    eaft = "eaft"


Url = Annotated[str, typer.Option(help="The server, e.g. http://127.0.0.1:30000; started with --softprune-stats.")]
Key = Annotated[str | None, typer.Option(help="softprune's key; else SOFTPRUNE_KEY, else the one that a server on this machine left.")]
EngineKey = Annotated[str | None, typer.Option(envvar=ENGINE_KEY_ENV, help="The engine's own API key, if it was started with one.")]
Mode = Annotated[ModeName, typer.Option(help="What to collect.")]
Sample = Annotated[str | None, typer.Option(metavar="1/N", help="Sample 1 token in N (reap, eaft); else as the server likes.")]
Attribute = Annotated[
    str | None,
    typer.Option(metavar="predictor|target", help="Of eaft: p and H go with the activations that made the prediction, or the token's own."),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="Statistics file.")]
Tag = Annotated[str | None, typer.Option(help="Only this tag; without it, all together.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@stats_app.command("start")
def stats_start(
    url: Url,
    mode: Mode = ModeName.router,
    sample: Sample = None,
    shadow: Annotated[
        str | None, typer.Option(metavar="1/N", help="Also count what the router would choose without its mask, for 1 token in N.")
    ] = None,
    attribution: Attribute = None,
    key: Key = None,
    engine_key: EngineKey = None,
) -> None:
    """Begin to collect on a running server."""
    every, shadowed = _one_in(sample), _one_in(shadow, "--shadow")
    if shadowed is not None and every not in (None, shadowed):
        raise InputError("--shadow", "", f"1/{shadowed}", f"1/{every}, as --sample: the same tokens are sampled for both")
    client = ServerClient(url, key, engine_key=engine_key)
    _tell(url, client.start_stats(mode.value, every or shadowed, attribution, shadowed is not None))


@stats_app.command("stop")
def stats_stop(url: Url, key: Key = None, engine_key: EngineKey = None) -> None:
    """Collect no more; what was counted stays on the server."""
    _tell(url, ServerClient(url, key, engine_key=engine_key).stop_stats())


@stats_app.command("reset")
def stats_reset(url: Url, key: Key = None, engine_key: EngineKey = None) -> None:
    """Forget what a server has counted, under all masks."""
    _tell(url, ServerClient(url, key, engine_key=engine_key).reset_stats())


@stats_app.command("fetch")
def stats_fetch(
    url: Url,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    mask: Annotated[
        str | None, typer.Option(metavar="HASH", help='Counted under this mask ("none": under none); else the one in force.')
    ] = None,
    key: Key = None,
    engine_key: EngineKey = None,
) -> None:
    """Download a server's statistics of one mask, and see that the file is whole."""
    data = ServerClient(url, key, engine_key=engine_key).stats_file(mask)
    try:
        with replaced_after(out) as temporary:
            temporary.write_bytes(data)
            header = read(temporary).header
    except OSError as error:
        raise StatisticsError(str(out), "", error.strerror or str(error), "a place that can be written") from None
    routed = sum(tokens.routed for tokens in header.tokens.values())
    text = f"{out}: mask {header.mask or 'none'}, {len(header.tags)} tags, {routed:,} routed tokens"
    console.print(text, soft_wrap=True, markup=False)


@stats_app.command("collect")
def stats_collect(
    url: Url,
    packs: Annotated[list[Path], typer.Option(metavar="PACK.parquet …", help="Harmony conversations, one a row of the column text.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; OUT.parts is kept beside it meanwhile.")],
    more_packs: Annotated[list[Path] | None, typer.Argument(metavar="PACK.parquet", hidden=True)] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 1024,
    num_blocks: Annotated[int | None, typer.Option(min=1, help="Blocks of each pack; else all that it fills.")] = None,
    mode: Mode = ModeName.router,
    sample: Sample = None,
    attribution: Attribute = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="DIR", help="Else that of the server's model, as the server names it.")] = None,
    blocks_a_part: Annotated[int, typer.Option(min=1, help="Blocks after which what was counted is drained into OUT.parts.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    key: Key = None,
    engine_key: EngineKey = None,
) -> None:
    """Replay packs through a running server, teacher-forced, and write the statistics, each pack under its file's name as a tag.

    Interrupted, the same command goes on where it was. Other requests that the server answers meanwhile are counted as well, under their
    own tags.
    """
    from softprune.stats.collect import Collection, Options  # Transformers, which takes a second to import
    from softprune.stats.collect_packs import load

    client = ServerClient(url, key, engine_key=engine_key)
    options = Options(mode.value, _one_in(sample), attribution, blocks_a_part, concurrency)
    files = [*packs, *(more_packs or [])]
    collection = Collection(client, load(files, tokenizer or client.status()["model"], seq_len, num_blocks), out, options)
    try:
        with count_progress("blocks", collection.num_blocks, Console(stderr=True), collection.num_done) as advance:
            header = collection.run(advance).header
    except BaseException as error:
        if collection.folder.file.exists():
            done = f"{collection.num_done} of {collection.num_blocks} blocks are in {collection.folder.path}"
            Console(stderr=True).print(f"{done}; the same command goes on from there", soft_wrap=True, markup=False)
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(130) from None
        raise
    if collection.lost_samples:
        console.print(f"warning: {collection.lost_samples:,} tokens were to be sampled, and could not be", soft_wrap=True)
    counted = ", ".join(f"{tag} {header.tokens[tag].routed:,}" for tag in header.tags if header.tokens[tag].routed)
    console.print(f"{out}: mask {header.mask or 'none'}, {len(header.runs)} runs, routed tokens: {counted}", soft_wrap=True, markup=False)


@stats_app.command("merge")
def stats_merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Statistics files of one model, mask and sampling.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
) -> None:
    """Add statistics files; refuses those that do not add up, and runs that would be counted twice."""
    check_apart(out, files)
    size = sum(file.stat().st_size for file in files if file.is_file())
    with tensor_progress(size, Console(stderr=True)) as progress:
        total = merging.merge_files(files, progress)
    write(total, out)
    header = total.header
    routed = sum(tokens.routed for tokens in header.tokens.values())
    text = f"{out}: {len(files)} files, {len(header.runs)} runs, {len(header.tags)} tags, {routed:,} routed tokens"
    console.print(text, soft_wrap=True, markup=False)


@stats_app.command("show")
def stats_show(
    file: File,
    tag: Tag = None,
    plot: Annotated[Path | None, typer.Option(metavar="OUT.svg|png", help="Draw selections, concentration and tags, too.")] = None,
    as_json: Json = False,
) -> None:
    """Show what was counted: tokens by tag, the use of experts by layer, perplexity."""
    if plot is not None:
        plots.check_suffix(plot)
    statistics = _read_needed(file)
    data = describe(statistics, tag)
    if plot is not None:
        plots.plot(statistics, plot, tag)
    if as_json:
        print(json.dumps(data, allow_nan=False))  # noqa: T201 - a console would wrap it
        return
    for part in tables.shown(statistics.header, data):
        console.print(part, soft_wrap=isinstance(part, str))
    if plot is not None:
        console.print(f"plot: {escape(str(plot))}", soft_wrap=True)


@stats_app.command("diff")
def stats_diff(
    a: Annotated[Path, typer.Argument(metavar="A")], b: Annotated[Path, typer.Argument(metavar="B")], tag: Tag = None, as_json: Json = False
) -> None:
    """Compare the selections of two files layer by layer; their weights and masks may differ, their shape may not."""
    data = compare(_read_needed(a), _read_needed(b), tag)
    if as_json:
        print(json.dumps(data, allow_nan=False))  # noqa: T201 - a console would wrap it
        return
    for part in tables.compared(data):
        console.print(part, soft_wrap=isinstance(part, str))


@stats_app.command("export")
def stats_export(file: File, parquet: Annotated[Path, typer.Option(metavar="OUT", help="Parquet file to write.")]) -> None:
    """Write one row for each layer, expert, tag and phase, with a column for each quantity."""
    from softprune.stats.export import export  # pyarrow, without which the other commands start

    check_apart(parquet, [file], "--parquet")
    rows = export(read(file, {name for name, spec in SPECS.items() if spec.axes.count("expert") == 1}), parquet)
    console.print(f"{parquet}: {rows:,} rows", soft_wrap=True, markup=False)


def _tell(url: str, state: dict[str, Any]) -> None:
    routed = sum(count["prefill"] + count["decode"] for mask in state["masks"] for count in mask["tokens"].values())
    doing = f"collecting {state['mode']}" if state["collecting"] else "not collecting"
    text = f"{url}: {doing}, {routed:,} routed tokens under {len(state['masks'])} masks, tags {', '.join(state['tags'])}"
    console.print(text, soft_wrap=True, markup=False)


def _one_in(sample: str | None, flag: str = "--sample") -> int | None:
    """N of "1/N".

    Raises:
        InputError: it is none.
    """
    if sample is None:
        return None
    one, _, number = sample.partition("/")
    if one != "1" or not (number.isascii() and number.isdigit()) or not 0 < int(number) < 2**31:
        raise InputError(flag, "", shortened(sample), "1/N, e.g. 1/16")
    return int(number)


def _read_needed(file: Path) -> Statistics:
    return read(file, needed(read_header(file)))
