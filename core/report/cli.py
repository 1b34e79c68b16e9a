"""`softprune report`: a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softprune.files import check_apart
from softprune.report.sizes import readable

console = Console(highlight=False)


def report_command(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="Statistics, evaluations, results of gates, sweeps (folder or sweep.json), masks.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")],
    base: Annotated[Path | None, typer.Option(help="Evaluation to compare the others with; else the first of several.")] = None,
    gates: Annotated[
        str, typer.Option(help="Thresholds where no result of a gate is given: near-lossless-v1, or a file.")
    ] = "near-lossless-v1",
) -> None:
    """Write one HTML file of what is given: verdicts, tables, planes, heatmaps. It needs no network and no server to be read."""
    from softprune.report.html import report, write_report  # Jinja2, Pillow and NumPy, without which the other commands start

    check_apart(out, [*files, base])
    text = report(files, base, gates)
    write_report(text, out)
    console.print(f"{out}: {readable(len(text.encode()))}", soft_wrap=True, markup=False)
