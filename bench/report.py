"""A report of raw benchmark files, from them alone: Markdown tables and SVG plots. And the figures of README and docs from headline.json.

    python -m softprune.bench.report RAW.json… -o FOLDER
    python -m softprune.bench.report --readme README.md

The first is also `softprune bench report`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from softprune.bench import headline
from softprune.bench.readme_figures import filled, shown
from softprune.bench.report_read import read_rows
from softprune.bench.report_rows import by_setting
from softprune.bench.report_text import markdown
from softprune.errors import InputError, SoftpruneError
from softprune.files import write_whole

HEADLINE = Path("bench") / "results" / "headline.json"
"""Beside README.md."""
PAGES = "docs/*.md"
"""Likewise; they hold such blocks as well."""
PICTURES = ("tok_s_*.svg", "ratio_*.svg", "memory.svg")
console = Console(highlight=False)


def report_command(
    raw: Annotated[
        list[Path] | None, typer.Argument(metavar="RAW…", help="Files of bench decode, compare, max-batch, or a matrix.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.md and the plots; made if there is none.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Instead, fill in the figures of this file and of docs/ beside it.")] = None,
) -> None:
    """Make a Markdown report with plots from raw benchmark files."""
    if readme is not None and not raw:
        figures = headline.read(readme.parent / HEADLINE)
        missing = set(figures)
        for page in pages(readme):
            try:
                text = page.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(str(page), "", str(error), "a readable text file") from None
            new = filled(text, figures, str(page))
            if new != text:
                write_whole(page, new)
            console.print(f"{page}: {'rewritten' if new != text else 'nothing changed'}", soft_wrap=True)
            missing -= set(shown(new))
        if missing:
            console.print(f"[yellow]shown nowhere:[/] {', '.join(sorted(missing))}", soft_wrap=True)
        return
    if not raw or out is None or readme is not None:
        raise typer.BadParameter("give raw files and --out FOLDER, or --readme FILE alone")
    text = write_report(raw, out)
    console.print(Markdown(text))
    console.print(f"{out / 'report.md'}", soft_wrap=True, markup=False)


def pages(readme: Path) -> list[Path]:
    """README, and the pages beside it."""
    return [readme, *sorted(readme.parent.glob(PAGES))]


def write_report(raw: list[Path], out: Path) -> str:
    """Write report.md and its pictures: tok_s_N.svg and ratio_N.svg of each setting, memory.svg; the Markdown.

    Raises:
        InputError: a file is no raw file, or holds nothing, or the folder cannot be made.
    """
    rows = read_rows(raw)
    if not (rows.speeds or rows.compared or rows.largest):
        raise InputError(", ".join(map(str, raw)), "results", "none", "at least one measured row")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(out), "", error.strerror or str(error), "a folder that can be made") from None
    from softprune.bench.report_plot import plot_memory, plot_ratios, plot_speeds

    for old in (old for name in PICTURES for old in out.glob(name)):
        old.unlink()
    for number, speeds in enumerate(by_setting(rows.speeds), 1):
        plot_speeds(speeds, out / f"tok_s_{number}.svg")
    for number, compared in enumerate(by_setting(rows.compared), 1):
        plot_ratios(compared, out / f"ratio_{number}.svg")
    if rows.memory:
        plot_memory(rows.memory, out / "memory.svg")
    text = markdown(rows)
    write_whole(out / "report.md", text)
    return text


if __name__ == "__main__":
    try:
        typer.run(report_command)
    except SoftpruneError as error:
        sys.exit(f"error: {error}")
