"""`softprune bench …`. What needs aiohttp is imported by the commands, so that the other commands start without it."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from softprune.bench.report import report_command
from softprune.control import ENGINE_KEY_ENV
from softprune.errors import InputError

if TYPE_CHECKING:
    from softprune.bench.decode import Step

bench_app = typer.Typer(help="Measure running servers.", no_args_is_help=True, rich_markup_mode="rich")
console = Console(highlight=False)


class ApiChoice(str, Enum):
    """Which API to measure."""

    auto = "auto"
    sglang = "sglang"
    openai = "openai"


@bench_app.callback()
def _bench() -> None:
    """Measure running servers."""


bench_app.command("report")(report_command)


@bench_app.command("decode")
def decode(
    url: Annotated[str, typer.Option(help="The server, e.g. http://127.0.0.1:30000.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write, with every sample.")],
    batch: Annotated[str, typer.Option(help="Requests at once; several sizes with commas.")] = "1,8,32,64",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of every prompt.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of every answer; forced.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Measured passes of each size.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Unmeasured passes of each size before them.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts; a server's prefix cache knows those of an earlier run.")] = 0,
    token_ids: Annotated[str, typer.Option(metavar="FIRST-LAST", help="Range of the prompts' token ids.")] = "100-999",
    api: Annotated[ApiChoice, typer.Option(help="API to measure; auto asks the server what it is.")] = ApiChoice.auto,
    stream: Annotated[bool, typer.Option(help="Without streaming, throughput only, and none of streaming's cost.")] = True,
    key: Annotated[str | None, typer.Option(help="softprune's key on that server, if it is not on this machine.")] = None,
    engine_key: Annotated[str | None, typer.Option(envvar=ENGINE_KEY_ENV, help="The engine's own API key.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Recorded if nothing else tells which GPU this is.")] = None,
    note: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Recorded as it is; may be repeated.")] = None,
    stall_seconds: Annotated[float, typer.Option(min=0.1, help="Longest silence; without streaming, longest answer.")] = 60.0,
) -> None:
    """Measure how fast a running SGLang or vLLM server decodes."""
    from softprune.bench.decode import BenchmarkError, Workload, measure

    batches = _numbers("--batch", batch, ",", "e.g. 1,8,32")
    ids = _numbers("--token-ids", token_ids, "-", "e.g. 100-999")
    if len(ids) != 2:
        raise typer.BadParameter(f"found {token_ids!r}; expected e.g. 100-999", param_hint="--token-ids")
    notes = dict(_pair(text) for text in note or [])
    # Found out before the measurement, not after it.
    if not out.absolute().parent.is_dir():
        raise InputError(str(out), "", "no such folder", "a file in a folder that exists")
    workload = Workload(prompt_tokens, max_new_tokens, seed, (ids[0], ids[1] + 1))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("connecting", total=None)

        def show(step: Step) -> None:
            speed = f"batch {step.result.batch}: {step.result.total_tok_s:,.0f} tok/s"
            bar.update(task, completed=step.done, total=step.total, description=speed)

        try:
            document = measure(
                url, workload, batches, repeats, warmup, stream, api=api.value, key=key, engine_key=engine_key, gpu=gpu, notes=notes,
                stall_seconds=stall_seconds, progress=show,
            )  # fmt: skip
        except BenchmarkError as error:
            if error.partial is not None:
                _write(out, error.partial)
            raise
    _write(out, document)
    console.print(_table(document))
    cached = [request["cached_tokens"] or 0 for row in document["results"] for one in row["repeats"] for request in one["streams"]]
    if sum(cached) > 0.05 * prompt_tokens * len(cached):
        console.print(f"[yellow]warning:[/] {sum(cached)} prompt tokens came from the server's prefix cache; use another --seed")
    console.print(f"{out}: {len(document['results'])} batch sizes, {repeats} repeats", soft_wrap=True, markup=False)


def _table(document: dict[str, Any]) -> Table:
    engine = document["engine"]
    title = f"{document['model']} on {engine['name']} {engine['version']}, {document['gpu'] or 'unknown device'}"
    table = Table("batch", "total tok/s", "spread", "decode tok/s", "TTFT p50 s", "inter-token p50 ms", title=title, box=None)
    for column in table.columns:
        column.justify = "right"
    for row in document["results"]:
        total = row["total_tok_s"]
        forms = {"decode_tok_s": ",.1f", "ttft_p50_s": ".3f", "inter_token_p50_ms": ".2f"}
        later = [_median(row[name], form) for name, form in forms.items()]
        table.add_row(str(row["batch"]), f"{total['median']:,.1f}", f"{total['spread']:.1%}", *later)
    return table


def _median(figure: dict[str, float] | None, form: str) -> str:
    return "-" if figure is None else format(figure["median"], form)


def _write(out: Path, document: dict[str, Any]) -> None:
    try:
        out.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise InputError(str(out), "", error.strerror or str(error), "a file that can be written") from None


def _numbers(option: str, text: str, separator: str, example: str) -> list[int]:
    try:
        return [int(part) for part in text.split(separator)]
    except ValueError:
        raise typer.BadParameter(f"found {text!r}; expected {example}", param_hint=option) from None


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"found {text!r}; expected KEY=VALUE", param_hint="--note")
    return name, value
