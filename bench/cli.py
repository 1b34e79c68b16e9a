"""`softprune bench …`. What needs aiohttp is imported by the commands, so that the other commands start without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from softprune.bench import options
from softprune.bench.compare_cli import compare_command
from softprune.bench.max_batch_cli import max_batch_command
from softprune.bench.options import ApiChoice, passes_progress, write
from softprune.bench.report import report_command

if TYPE_CHECKING:
    from softprune.bench.decode import Step

bench_app = typer.Typer(help="Measure running servers.", no_args_is_help=True, rich_markup_mode="rich")
console = Console(highlight=False)


@bench_app.callback()
def _bench() -> None:
    """Measure running servers."""


bench_app.command("compare")(compare_command)
bench_app.command("max-batch")(max_batch_command)
bench_app.command("report")(report_command)


@bench_app.command("decode")
def decode(
    url: options.Url,
    out: options.Out,
    batch: options.Batches = "1,8,32,64",
    prompt_tokens: options.PromptTokens = 256,
    max_new_tokens: options.NewTokens = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Measured passes of each size.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Unmeasured passes of each size before them.")] = 1,
    seed: options.Seed = 0,
    token_ids: options.TokenIds = "100-999",
    api: options.ApiOption = ApiChoice.auto,
    stream: options.Streamed = True,
    key: options.Key = None,
    engine_key: options.EngineKey = None,
    gpu: options.Gpu = None,
    note: options.Notes = None,
    stall_seconds: options.Stall = 60.0,
) -> None:
    """Measure how fast a running SGLang or vLLM server decodes."""
    from softprune.bench.decode import BenchmarkError, measure

    batches = options.batch_sizes(batch)
    workload = options.workload(prompt_tokens, max_new_tokens, seed, token_ids)
    notes = options.notes(note)
    options.check_out(out)
    with passes_progress(console) as advance:

        def show(step: Step) -> None:
            advance(f"batch {step.result.batch}: {step.result.total_tok_s:,.0f} tok/s", step.done, step.total)

        try:
            document = measure(
                url, workload, batches, repeats, warmup, stream, api=api.value, key=key, engine_key=engine_key, gpu=gpu, notes=notes,
                stall_seconds=stall_seconds, progress=show,
            )  # fmt: skip
        except BenchmarkError as error:
            if error.partial is not None:
                write(out, error.partial)
            raise
    write(out, document)
    console.print(_table(document))
    options.warn_of_cache(console, document["results"], prompt_tokens)
    options.warn_of_client(console, document["results"])
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
        later = [options.median(row[name], form) for name, form in forms.items()]
        table.add_row(str(row["batch"]), f"{total['median']:,.1f}", f"{total['spread']:.1%}", *later)
    return table
