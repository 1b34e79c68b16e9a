"""`softprune bench compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softprune import mask as mask_file
from softprune.bench import options
from softprune.bench.options import ApiChoice, median, passes_progress

if TYPE_CHECKING:
    from softprune.bench.compare import Masks, Urls
    from softprune.bench.decode import Step
    from softprune.bench.step_limits import StepLimits

console = Console(highlight=False)

MaskOption = typer.Option(metavar="FILE", help="Mask of this side, switched live; none is the unpruned router.")


def compare_command(
    out: options.Out,
    url: Annotated[str | None, typer.Option(help="One server whose masks are switched live; it needs --softprune-control.")] = None,
    mask_a: Annotated[str | None, MaskOption] = None,
    mask_b: Annotated[str | None, MaskOption] = None,
    url_a: Annotated[str | None, typer.Option(help="Or two servers: A, as it is,")] = None,
    url_b: Annotated[str | None, typer.Option(help="and B.")] = None,
    batch: options.Batches = "1,8,32,64",
    prompt_tokens: options.PromptTokens = 256,
    max_new_tokens: options.NewTokens = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of measured passes of each size; fewer than 3 give no interval.")] = 8,
    warmup: Annotated[int, typer.Option(min=0, help="Unmeasured passes of each side and size before them.")] = 1,
    seed: options.Seed = 0,
    token_ids: options.TokenIds = "100-999",
    api: options.ApiOption = ApiChoice.auto,
    stream: options.Streamed = True,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint folder, for the roofline; only headers are read.")] = None,
    model_b: Annotated[Path | None, typer.Option(help="That of B, if it is another.")] = None,
    stats: Annotated[Path | None, typer.Option(help="Statistics file that says how experts are chosen; else uniformly.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.001, metavar="GB/S", help="Of the memory, read and written; else measured.")
    ] = None,
    key: options.Key = None,
    key_b: Annotated[str | None, typer.Option(help="That of B's server, if it is another.")] = None,
    engine_key: options.EngineKey = None,
    gpu: options.Gpu = None,
    note: options.Notes = None,
    stall_seconds: options.Stall = 60.0,
) -> None:
    """Measure two masks of a server, or two servers, in turns: is B faster than A?

    Passes are measured in the order A B B A A B B A …; told are the median ratio of the pairs and its 95 % interval, and a difference that
    is no larger than the noise is called none. The mask that was in force before is put back.
    """
    from softprune.bench.compare import compare

    sides = _sides(url, mask_a, mask_b, url_a, url_b, (key, key_b or key))
    batches, notes = options.batch_sizes(batch), options.notes(note)
    workload = options.workload(prompt_tokens, max_new_tokens, seed, token_ids)
    limits = _limits(model, model_b, stats, bandwidth)
    options.check_out(out)
    document: dict[str, Any] = {}
    try:
        with passes_progress(console) as advance:

            def show(side: str, step: Step) -> None:
                speed = f"batch {step.result.batch}, {side.upper()}: {step.result.total_tok_s:,.0f} tok/s"
                advance(speed, step.done, step.total)

            compare(
                sides, workload, batches, repeats, warmup, stream, api=api.value, key=key, engine_key=engine_key, gpu=gpu, limits=limits,
                notes=notes, stall_seconds=stall_seconds, progress=show, into=document,
            )  # fmt: skip
    finally:
        if "results" in document:
            options.write(out, document)
    console.print(table(document))
    for row in document["results"]:
        console.print(f"batch {row['batch']}: {row['says']}", markup=False, soft_wrap=True)
    rows = [row[side] for row in document["results"] for side in "ab"]
    options.warn_of_cache(console, rows, prompt_tokens)
    options.warn_of_client(console, rows)
    console.print(f"{out}: {len(document['results'])} batch sizes, {repeats} pairs", soft_wrap=True, markup=False)


def table(document: dict[str, Any]) -> Table:
    """What was found, for a terminal."""
    a, b = document["sides"]["a"], document["sides"]["b"]
    title = f"A: {_called(a)}\nB: {_called(b)}\n{a['gpu'] or 'unknown device'}"
    columns = ["batch", "pairs", "while", "A tok/s", "B tok/s", "B / A", "95 % interval"]
    shown = Table(*columns, *(["A of limit", "B of limit"] if document["bandwidth"] else []), title=escape(title), box=None)
    for column in shown.columns:
        column.justify = "right"
    for row in document["results"]:
        figure = row["figure"]
        ratio = row["ratio"][figure]
        ends = "-" if ratio["low"] is None else f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        cells = [str(row["batch"]), str(len(ratio["pairs"])), "decoding" if figure == "decode_tok_s" else "in all"]
        cells += [median(row[side][figure], ",.1f") for side in "ab"]
        limits = [f"{row['roofline'][side]['share']:.0%}" for side in "ab"] if row["roofline"] else []
        shown.add_row(*cells, f"{ratio['median']:.3f}", ends, *limits)
    return shown


def _called(side: dict[str, Any]) -> str:
    return f"{side['name']}, {side['model']} on {side['engine']['name']} {side['engine']['version']}"


def _sides(
    url: str | None, mask_a: str | None, mask_b: str | None, url_a: str | None, url_b: str | None, keys: tuple[str | None, str | None]
) -> Masks | Urls:
    from softprune.bench.compare import Masks, Urls

    given = [value is not None for value in (url, mask_a, mask_b, url_a, url_b)]
    if given == [True, True, True, False, False]:
        assert url is not None
        assert mask_a is not None
        assert mask_b is not None
        a, b = (None if text == "none" else mask_file.load(Path(text)) for text in (mask_a, mask_b))
        return Masks(url, a, b, (Path(mask_a).name, Path(mask_b).name))
    if given == [False, False, False, True, True]:
        assert url_a is not None
        assert url_b is not None
        return Urls(url_a, url_b, ("first server", "second server"), keys)
    raise typer.BadParameter("give either --url, --mask-a and --mask-b, or --url-a and --url-b")


def _limits(model: Path | None, model_b: Path | None, stats: Path | None, gb_s: float | None) -> StepLimits | None:
    from softprune.bench.step_limits import StepLimits
    from softprune.stats.file import read

    if model is None:
        if model_b is not None or stats is not None or gb_s is not None:
            raise typer.BadParameter("a roofline needs --model", param_hint="--model-b, --stats, --bandwidth")
        return None
    statistics = None if stats is None else read(stats, only=("router.count",))
    return StepLimits({"a": model, "b": model_b or model}, statistics, gb_s)
