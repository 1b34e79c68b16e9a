"""`softprune bench max-batch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from softprune.bench import options
from softprune.bench.options import ApiChoice, passes_progress

if TYPE_CHECKING:
    from softprune.bench.max_batch import Try

console = Console(highlight=False)


def max_batch_command(
    url: options.Url,
    out: options.Out,
    prompt_tokens: options.PromptTokens = 256,
    max_new_tokens: options.NewTokens = 2048,
    most: Annotated[int, typer.Option("--max", min=1, help="No larger batch is tried.")] = 1024,
    start: Annotated[int | None, typer.Option(min=1, help="First batch; else what the KV room should hold.")] = None,
    step: Annotated[int, typer.Option(min=1, help="Stop once the answer is known so closely; 1 for exactly.")] = 1,
    max_running: Annotated[int | None, typer.Option(min=1, help="The engine's cap on running requests, if it does not tell it.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Passes of the batch that is found; all have to run.")] = 3,
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
    """Find the largest batch that a server decodes to the end: all at once, none preempted or retracted, no error.

    Read from the engine's own metrics; SGLang needs --enable-metrics. Nobody else may use the server meanwhile.
    """
    from softprune.bench.max_batch import max_batch

    workload, notes = options.workload(prompt_tokens, max_new_tokens, seed, token_ids), options.notes(note)
    options.check_out(out)
    document: dict[str, Any] = {}
    try:
        with passes_progress(console) as advance:

            def show(tried: Try, number: int) -> None:
                advance(f"batch {tried.batch}: {tried.why or 'runs'}", number, None)

            max_batch(
                url, workload, most, start, step, repeats, stream, max_running=max_running, api=api.value, key=key, engine_key=engine_key,
                gpu=gpu, notes=notes, stall_seconds=stall_seconds, progress=show, into=document,
            )  # fmt: skip
    finally:
        if "tries" in document:
            options.write(out, document)
    for line in lines(document):
        console.print(line, markup=False, soft_wrap=True)
    if document["not_monotone"]:
        sizes = ", ".join(map(str, document["not_monotone"]))
        console.print(f"[yellow]warning:[/] {sizes} failed although as large a batch ran at another time")
    console.print(f"{out}: {len(document['tries'])} tries", soft_wrap=True, markup=False)
    if document["max_batch"] is None:
        raise typer.Exit(2)


def lines(document: dict[str, Any]) -> list[str]:
    """What was found, for a terminal."""
    size, engine, result = document["max_batch"], document["engine"], document["result"]
    served = f"{document['model']} on {engine['name']} {engine['version']}, {document['gpu'] or 'unknown device'}"
    if size is None:
        return [served, f"not even 1 request of this length runs: {document['limit']}"]
    speeds = [
        f"{result[name]['median']:,.1f} tok/s {what}"
        for name, what in (("total_tok_s", "in all"), ("decode_tok_s", "decoding"))
        if result[name]
    ]
    spread = f"{len(result['repeats'])} repeats, spread {result['total_tok_s']['spread']:.1%}"
    kv = document["memory"]["kv_tokens"]
    room = f"; KV room for {kv:,} tokens" if kv else ""
    return [served, f"largest batch {size}{room}", f"limited by: {document['limit']}", f"{', '.join(speeds)} ({spread})"]
