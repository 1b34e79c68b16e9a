"""`softprune stats …`: statistics files, added, shown, compared and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from softprune.report.progress import tensor_progress
from softprune.stats import merge as merging
from softprune.stats import plots, tables
from softprune.stats.file import Statistics, read, read_header, write
from softprune.stats.layout import SPECS
from softprune.stats.summary import compare, describe, needed

stats_app = typer.Typer(help="Add, show, compare and export statistics files.", no_args_is_help=True, rich_markup_mode="rich")
console = Console(highlight=False)

File = Annotated[Path, typer.Argument(metavar="FILE", help="Statistics file.")]
Tag = Annotated[str | None, typer.Option(help="Only this tag; without it, all together.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@stats_app.command("merge")
def stats_merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Statistics files of one model, mask and sampling.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
) -> None:
    """Add statistics files; refuses those that do not add up, and runs that would be counted twice."""
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

    rows = export(read(file, {name for name, spec in SPECS.items() if spec.axes.count("expert") == 1}), parquet)
    console.print(f"{parquet}: {rows:,} rows", soft_wrap=True, markup=False)


def _read_needed(file: Path) -> Statistics:
    return read(file, needed(read_header(file)))
