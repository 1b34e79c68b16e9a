"""`softprune gate`: a verdict on two evaluation files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from softprune.errors import SoftpruneError, of_system
from softprune.evaluate import evaluation, gates, pair
from softprune.evaluate.bootstrap import Interval
from softprune.evaluate.errors import EvaluationFileError
from softprune.evaluate.gate_result import COLOURS, EXIT_CODES, GateResult, Row
from softprune.evaluate.gates import Check, Gates
from softprune.evaluate.served import mask_name
from softprune.files import check_apart, write_whole

console = Console(highlight=False)
_UsageError: Any = typer.BadParameter.__mro__[1]  # of click, which typer depends on or has a copy of


class Rule(str, Enum):
    """Of the perplexity's two limits."""

    min = "min"
    max = "max"


class Thresholds(str, Enum):
    """Of confident conflict."""

    base = "base"
    own = "own"


class Packs(str, Enum):
    """That are judged."""

    primary = "primary"
    all = "all"


def gate_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Evaluation file of the unpruned model.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="Evaluation file of the pruned one.")],
    thresholds: Annotated[str, typer.Option("--gates", help=f"Thresholds: {', '.join(gates.shipped())}, or a file.")] = gates.NEAR_LOSSLESS,
    ppl_rule: Annotated[Rule | None, typer.Option(help="Of the two limits of perplexity, the tighter or the wider holds.")] = None,
    cc_thresholds: Annotated[
        Thresholds | None,
        typer.Option(help="Confident conflicts are counted under the base's, or each side's own."),
    ] = None,
    packs: Annotated[Packs | None, typer.Option(help="Rows that are judged.")] = None,
    seed: Annotated[int, typer.Option(help="Of bootstrap draws and halves.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the result as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no table.")] = False,
) -> None:
    """Judge a candidate: exits with 0 for PASS, 1 for FAIL, 2 for INCOMPLETE, 3 for INVALID or what cannot be read."""
    with exits_as_gate(Console(stderr=True)):
        if out is not None:
            check_apart(out, [base, candidate])
        chosen = gates.read(
            thresholds, ppl_rule=ppl_rule and ppl_rule.value, cc_thresholds=cc_thresholds and cc_thresholds.value,
            gate_packs=packs and packs.value,
        )  # fmt: skip
        result = judge(base, candidate, chosen, seed)
        document = result.dump()
        if out is not None:
            write_whole(out, document)
    if as_json:
        typer.echo(document, nl=False)
    else:
        show(result)
    raise typer.Exit(result.exit_code)


class GateCommand(TyperCommand):
    """Wrong arguments end with INVALID's code as well: the command line's own, 2, would mean INCOMPLETE."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _usage_is_invalid():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _usage_is_invalid():
            return super().invoke(ctx)


@contextmanager
def _usage_is_invalid() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.exit_code = EXIT_CODES["INVALID"]
        raise


@contextmanager
def exits_as_gate(errors: Console) -> Iterator[None]:
    """End with INVALID's code after an error: the command line's own, 2, would mean INCOMPLETE.

    Args:
        errors: where it is told.

    Raises:
        typer.Exit: in the place of a SoftpruneError or an OSError.
    """
    try:
        yield
    except (SoftpruneError, OSError) as error:
        text = of_system(error) if isinstance(error, OSError) else str(error)
        errors.print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_CODES["INVALID"]) from None


def judge(base: Path, candidate: Path, chosen: Gates, seed: int = 0) -> GateResult:
    """Read two files and compare them; one that cannot be read is INVALID."""
    try:
        sides = [evaluation.read(path) for path in (base, candidate)]
    except EvaluationFileError as error:
        # Only the file's name: a result that is passed on should not tell of its maker's folders.
        named = EvaluationFileError(Path(error.file).name, error.field, error.found, error.expected)
        return pair.invalid(str(base), str(candidate), chosen, str(named))
    return pair.compare(sides[0], sides[1], chosen, seed)


def show(result: GateResult) -> None:
    """Print the verdict, a table of every check, what was compared, and what is wrong."""
    table = Table("row", "metric", "base", "candidate", "difference", "95 % interval", "limit", "", box=None)
    for row in result.rows:
        for i, check in enumerate(row.checks):
            name = f"{escape(row.pack)}@{row.seq_len}" + ("" if row.gated else " [dim](not judged)[/]")
            table.add_row(name if i == 0 else "", *_cells(row, check), style=None if row.gated else "dim")
        table.add_section()
    if result.rows:
        console.print(table)
    for row in result.rows:
        console.print(_js2d_line(row), soft_wrap=True)
    for name, side in (("base", result.base), ("candidate", result.candidate)):
        if result.verdict != "INVALID":
            console.print(
                f"[dim]{name}: {escape(str(side['label']))}, mask {mask_name(side['mask'], side['fingerprint'])}[/]", soft_wrap=True
            )
    for problem in result.problems:
        console.print(f"[yellow]{escape(problem)}[/]", soft_wrap=True)
    failed = [
        f"{row.pack}@{row.seq_len} {_over(check)}" for row in result.rows if row.gated for check in row.checks if check.passed is False
    ]
    text = f"[bold {COLOURS[result.verdict]}]{result.verdict}[/] by {escape(result.gates.name)}"
    console.print(text + (f": {escape('; '.join(failed))}" if failed else ""), soft_wrap=True)


def _cells(row: Row, check: Check) -> list[str]:
    mark = {True: "[green]ok[/]", False: "[red]over[/]", None: "[yellow]not judged[/]"}[check.passed]
    if check.value is None:
        return [check.metric, "", "", "", "", f"{check.limit:.4f}", mark]
    if check.metric == "js2d":
        return ["js2d", "", "", f"{check.value:.4f}", "", f"{check.limit:.4f}", mark]
    found: Interval = row.delta[check.metric]
    base = row.base["cc_rate" if check.metric.startswith("cc_rate") else check.metric]
    digits = ".5f" if check.metric.startswith("cc_rate") else ".4f"
    return [
        check.metric, f"{base:{digits}}", f"{row.candidate[check.metric]:{digits}}", f"{check.value:+{digits}}",
        _range(found.low, found.high, f"+{digits}"), f"±{check.limit:{digits}}", mark,
    ]  # fmt: skip


def _range(low: float | None, high: float | None, digits: str) -> str:
    return "" if low is None or high is None else f"{low:{digits}} to {high:{digits}}"


def _js2d_line(row: Row) -> str:
    js2d, coarse = row.js2d, row.coarse
    form = next(check.note for check in row.checks if check.metric == "js2d")
    number = f"{int(row.base['tokens']):,} tokens, {js2d.occupied_cells:,} cells"
    interval = _range(js2d.low, js2d.high, ".4f")
    corrected = (
        f"corrected {js2d.corrected:.4f}"
        + (f" ({interval})" if interval else ", at least")
        + f", of 4 x 4 bins in one {coarse.corrected:.4f}"
    )
    return f"[dim]{escape(row.pack)}@{row.seq_len}: JS2D raw {js2d.raw:.4f}, {corrected}; {number}; judged: {form}[/]"


def _over(check: Check) -> str:
    assert check.value is not None
    return f"{check.metric} {check.value:+.4g}, over the limit of {check.limit:.4g} by {abs(check.value) - check.limit:.4g}"
