"""What rewriting costs: the 20B shape to 24 experts against `cp` of the bytes that it writes, and how it grows.

    python -m softprune.bench.rewrite WORK_DIR [--repeats 3] [--record]

Both sides end in fsync and are measured in turn, in one run, with what they read in the page cache and with it dropped. Needs 40 GB
in WORK_DIR. `--record` writes bench/results/rewrite.json, rewrite.svg and the headline figures. Run by root, both sides get priority over
what else the machine does; times of a busy machine say little otherwise.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from softprune.bench import headline
from softprune.bench.figures import spread
from softprune.bench.hollow import hollow_checkpoint
from softprune.bench.rewrite_plot import plot
from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.plan import Copied, RewritePlan, plan_rewrite
from softprune.checkpoint.synth import synth_checkpoint
from softprune.checkpoint.writer import MAX_SHARD_BYTES
from softprune.files import write_whole
from softprune.mask import ExpertMask
from softprune.mask_forms import build

PRESET, KEEP = "gpt-oss-20b", 24
RESULTS = Path("bench/results")
CACHES = ("warm", "cold")


def main(
    work: Annotated[Path, typer.Argument(help="Folder for 40 GB; emptied of them at the end.")],
    repeats: Annotated[int, typer.Option(help="Pairs in each state of the cache.")] = 3,
    record: Annotated[bool, typer.Option(help="Write the files under bench/results.")] = False,
) -> None:
    """Measure, print and perhaps record."""
    if os.geteuid() == 0:
        os.nice(-15)
        Path("/proc/self/autogroup").write_text("-15")
    document = measure(work, repeats)
    typer.echo(json.dumps(document["summary"], indent=1))
    if record:
        write_whole(RESULTS / "rewrite.json", json.dumps(document, indent=1) + "\n")
        plot(document, RESULTS / "rewrite.svg")
        summary = document["summary"]
        for name, value, unit in (
            ("time_over_cp", max(summary[cache]["time_over_cp"]["median"] for cache in CACHES), "ratio"),
            ("peak_mib", summary["peak_mib"], "MiB"),
        ):
            headline.record(RESULTS / "headline.json", f"rewrite.20b_keep24.{name}", round(value, 4), unit, "rewrite.json")


def measure(work: Path, repeats: int) -> dict[str, Any]:
    """All figures, JSON-ready: every pair, the growth, the plan of the 120B shape, and a summary."""
    source, reference, mask_path = work / "source", work / "reference", work / "mask.json"
    if not source.exists():
        synth_checkpoint(PRESET, source, "mxfp4")
    random_mask(source, KEEP).save(mask_path)
    plan = plan_rewrite(source, random_mask(source, KEEP))
    once(source, mask_path, reference)
    pairs = []
    for cache in CACHES:
        for repeat in range(repeats):
            sides = [("cp", reference), ("rewrite", source)]
            row: dict[str, Any] = {"cache": cache, "repeat": repeat}
            for side, reads in sides if repeat % 2 == 0 else reversed(sides):
                for folder in (source, reference):
                    drop(folder)
                if cache == "warm":
                    warm(plan if side == "rewrite" else None, reads)
                row[side] = once(source, mask_path, work / "out") if side == "rewrite" else copy(reference, work / "copy")
                for made in ("out", "copy"):
                    shutil.rmtree(work / made, ignore_errors=True)
            row["time_over_cp"] = row["rewrite"]["seconds"] / row["cp"]["seconds"]
            pairs.append(row)
            typer.echo(f"{cache} {repeat}: cp {row['cp']['seconds']:.2f} s, rewrite {row['rewrite']['seconds']:.2f} s", err=True)
            write_whole(work / "pairs.json", json.dumps(pairs))
    shutil.rmtree(reference)
    growth = grow(source, work)
    large = hollow_checkpoint("gpt-oss-120b", work / "120b")
    document = {
        "what": "softprune.bench.rewrite", "date": datetime.date.today().isoformat(), "python": platform.python_version(),
        "cores": os.cpu_count(), "nice": os.nice(0), "preset": PRESET, "keep": KEEP, "bytes": plan.bytes_written, "pairs": pairs,
        "growth": growth,
        "plan_120b": describe(plan_rewrite(large, random_mask(large, 64))),
    }  # fmt: skip
    shutil.rmtree(large)
    return {**document, "summary": summarise(document)}


def random_mask(source: Path, keep: int) -> ExpertMask:
    """So many random experts a layer; the seed is fixed."""
    spec, rng = spec_of(read_config(source)), random.Random(0)
    rows = [rng.sample(range(spec.num_experts), keep) for _ in spec.moe_layers]
    return build(spec, rows, None, {"method": "random", "seed": 0}, "random")


def once(source: Path, mask: Path, out: Path, limit: int = MAX_SHARD_BYTES, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """A rewrite in a fresh process."""
    chosen = "all" if layers is None else ",".join(map(str, layers))
    command = [sys.executable, "-m", "softprune.bench.rewrite_once", str(source), str(mask), str(out), str(limit), chosen]
    figures: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return figures


def copy(source: Path, out: Path) -> dict[str, Any]:
    """`cp -r`, and fsync of every file."""
    begun, used = time.monotonic(), time.process_time() + _children()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for file in out.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    seconds, used = time.monotonic() - begun, time.process_time() + _children() - used
    return {"seconds": seconds, "cpu_seconds": used, "bytes": sum(file.stat().st_size for file in out.iterdir())}


def _children() -> float:
    """CPU seconds of ended child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def drop(folder: Path) -> None:
    """Take a folder's files out of the page cache; what was not yet written stays, and fsync has seen to that."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(plan: RewritePlan | None, folder: Path) -> None:
    """Read what a rewrite will read, or, without a plan, a whole folder."""
    pieces = [Copied(file, 0, file.stat().st_size) for file in folder.iterdir()]
    if plan is not None:
        pieces = [piece for tensor in plan.tensors for piece in tensor.pieces if isinstance(piece, Copied)]
    for piece in pieces:
        with open(piece.file, "rb", buffering=0) as file:
            file.seek(piece.start)
            left = piece.num_bytes
            while left > 0:
                left -= len(file.read(min(left, 1 << 22)))


def grow(source: Path, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Time and memory with more layers, experts and shards, everything in the page cache."""
    masks = {}
    for keep in (4, 16, 24, 32):
        masks[keep] = work / f"keep{keep}.json"
        random_mask(source, keep).save(masks[keep])
    runs = {
        "layers": [(number, masks[KEEP], MAX_SHARD_BYTES, number) for number in (1, 2, 4, 8)],
        "experts": [(keep, path, MAX_SHARD_BYTES, 4) for keep, path in masks.items()],
        "shards": [(0, masks[KEEP], size, 4) for size in (5_000_000_000, 500_000_000, 200_000_000, 100_000_000)],
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for what, rows in runs.items():
        found[what] = []
        for number, mask, shard, layers in rows:
            chosen = list(range(layers))
            once(source, mask, work / "out", shard, chosen)  # reads it into the page cache
            samples = []
            for _ in range(3):
                shutil.rmtree(work / "out")
                samples.append(once(source, mask, work / "out", shard, chosen))
            shutil.rmtree(work / "out")
            middle = statistics.median(sample["seconds"] for sample in samples)
            at = samples[0]["shards"] if what == "shards" else number
            peak = max(sample["peak_mib"] for sample in samples)
            found[what].append({"number": at, "layers": layers, "seconds": middle, "peak_mib": peak, "samples": samples})
    return found


def describe(plan: RewritePlan) -> dict[str, Any]:
    """A plan in numbers."""
    return {
        "keep": plan.num_experts,
        "source_bytes": plan.index.num_bytes,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "router_and_expert_bytes": plan.pruned_bytes(),
        "shards_written": len(plan.shards),
        "source_shards": len(plan.index.shards),
        "source_shards_touched": {layer: len(plan.shards_touched(layer)) for layer in plan.moe_layers},
    }


def summarise(document: dict[str, Any]) -> dict[str, Any]:
    """Medians over the pairs, and what the 120B shape would take at the speed of the cold ones."""
    of = {cache: [pair for pair in document["pairs"] if pair["cache"] == cache] for cache in CACHES}
    summary: dict[str, Any] = {
        cache: {
            "time_over_cp": spread([pair["time_over_cp"] for pair in pairs]),
            "cp_s": spread([pair["cp"]["seconds"] for pair in pairs]),
            "rewrite_s": spread([pair["rewrite"]["seconds"] for pair in pairs]),
        }
        for cache, pairs in of.items()
    }
    summary["peak_mib"] = max(pair["rewrite"]["peak_mib"] for pair in document["pairs"])
    speed = document["bytes"] / summary["cold"]["rewrite_s"]["median"]
    summary["plan_120b_keep64_cold_s"] = document["plan_120b"]["bytes_written"] / speed
    return summary


if __name__ == "__main__":
    typer.run(main)
