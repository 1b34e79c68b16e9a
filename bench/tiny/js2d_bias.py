"""JS2D against the number of tokens: the raw value falls with every doubling, the corrected one stays within its interval.

    .venv/bin/python -m softprune.bench.tiny.js2d_bias BASE.json CANDIDATE.json [CANDIDATE.json …]

The files are evaluations (`softprune eval`, or `softprune.bench.tiny.evaluate`) of one pack. Blocks are taken in random order; of 16, 32,
64 … blocks, as many disjoint selections as there are, at most 8, are compared on their own.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from softprune.evaluate.evaluation import BlockSums, read
from softprune.evaluate.js2d import independent, paired
from softprune.evaluate.packing import UNION
from softprune.files import write_whole
from softprune.report.progress import count_progress

FORMAT, VERSION = "softprune.js2d-bias", 1
FEWEST, MOST_SELECTIONS = 16, 8


def measure(base: BlockSums, candidate: BlockSums, num_cells: int, seed: int = 0) -> list[dict[str, Any]]:
    """Figures of every number of blocks, fewest first.

    Args:
        base, candidate: both sides of the same blocks.
        num_cells: of the plane.
        seed: of the order of the blocks.

    Returns:
        Entries with "blocks", "tokens" (mean), and lists with a number for each selection: "raw", "corrected", "low", "high", and
        "independent", raw less the bias that independent samples would have.
    """
    starts = np.cumsum(base.tokens) - base.tokens
    order = np.random.default_rng(seed).permutation(len(starts))
    sizes = [len(starts) >> i for i in range(len(starts).bit_length()) if len(starts) >> i >= FEWEST][::-1]
    entries = []
    for size in sizes:
        found: dict[str, list[float]] = {name: [] for name in ("tokens", "raw", "corrected", "low", "high", "independent")}
        for part in range(min(MOST_SELECTIONS, len(starts) // size)):
            chosen = np.sort(order[part * size : (part + 1) * size])
            at = np.concatenate([np.arange(starts[i], starts[i] + base.tokens[i]) for i in chosen])
            sides = [side.cells[at] for side in (base, candidate)]
            js2d = asdict(paired(sides[0], sides[1], base.tokens[chosen], seed))
            counts = [np.bincount(side, minlength=num_cells).astype(np.int64) for side in sides]
            # Unclipped, since a bound at 0 would hide by how much it is wrong.
            js2d |= {"tokens": len(at), "independent": js2d["raw"] - independent(counts[0], counts[1]).bias}
            for name, values in found.items():
                values.append(round(float(js2d[name]), 6))
        entries.append({"blocks": size, **found, "tokens": float(np.mean(found["tokens"]))})
    return entries


def halving(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What half of the blocks changes: of raw and corrected the mean change of the two halves, and the interval of all blocks."""
    half, whole = entries[-2:]
    change = {name: abs(float(np.mean(half[name])) - whole[name][0]) for name in ("raw", "corrected")}
    worst = max(abs(value - whole["corrected"][0]) for value in half["corrected"])
    holds = sum(low <= whole["corrected"][0] <= high for low, high in zip(half["low"], half["high"], strict=True))
    width = whole["high"][0] - whole["low"][0]
    return {**change, "worst_corrected": worst, "interval_width": width, "halves_whose_interval_holds_the_whole": holds}


def plot(candidates: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Write an SVG; same figures, same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "softprune"
    figure = Figure(figsize=(4.2 * len(candidates) + 0.6, 4), layout="constrained")
    for axes, (label, entries) in zip(np.atleast_1d(figure.subplots(1, len(candidates), sharey=True)), candidates.items(), strict=True):
        tokens = [entry["tokens"] for entry in entries]
        for name, style in (("raw", "o-C3"), ("independent", "s--C7")):
            named = "raw" if name == "raw" else "less the bias of independent samples"
            axes.plot(tokens, [np.mean(entry[name]) for entry in entries], style, label=named, markersize=4, linewidth=1.2)
        middle = [float(np.mean(entry["corrected"])) for entry in entries]
        ends = [[float(np.mean(entry[name])) for entry in entries] for name in ("low", "high")]
        bars = [np.maximum(0, np.subtract(middle, ends[0])), np.maximum(0, np.subtract(ends[1], middle))]
        axes.errorbar(tokens, middle, bars, fmt="D-C0", label="corrected, 95 % interval", markersize=4, linewidth=1.2, capsize=3)
        for entry in entries:
            axes.plot([entry["tokens"]] * len(entry["corrected"]), entry["corrected"], ".", color="C0", alpha=0.35, markersize=4)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(title=label, xlabel="completion tokens", xscale="log")
        axes.set_xticks(tokens, labels=[f"{count / 1000:.0f}k" for count in tokens])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("JS2D, nats")
    figure.axes[0].legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def table(candidates: dict[str, list[dict[str, Any]]]) -> Table:
    """A row for each candidate and number of tokens; means over the selections."""
    shown = Table("candidate", "blocks", "tokens", "raw", "corrected", "95 % interval", "as if independent")
    for label, entries in candidates.items():
        for entry in entries:
            mean = {name: float(np.mean(entry[name])) for name in ("raw", "corrected", "low", "high", "independent")}
            interval = f"{mean['low']:.4f} to {mean['high']:.4f}"
            numbers = (f"{mean['raw']:.4f}", f"{mean['corrected']:.4f}", interval, f"{mean['independent']:.4f}")
            shown.add_row(label, str(entry["blocks"]), f"{entry['tokens']:,.0f}", *numbers)
    return shown


def main(
    base: Annotated[Path, typer.Argument(help="Evaluation of the unpruned model.")],
    candidates: Annotated[list[Path], typer.Argument(help="Evaluations of pruned ones.")],
    out: Annotated[Path, typer.Option(help="The document; a plot is drawn beside it.")] = Path("bench/results/js2d_bias.json"),
    pack: Annotated[str, typer.Option(help="Of the files.")] = UNION,
    seq_len: Annotated[int, typer.Option(help="Of the files.")] = 1024,
) -> None:
    """Measure, and write the document, its plot and a table."""
    left = read(base)
    found: dict[str, list[dict[str, Any]]] = {}
    with count_progress("candidates", len(candidates), Console(stderr=True)) as advance:
        for right in map(read, candidates):
            sides = [side.cell(pack, seq_len).blocks for side in (left, right)]
            assert sides[0] is not None
            assert sides[1] is not None
            found[right.label] = measure(sides[0], sides[1], left.plane.xbins * left.plane.ybins)
            advance(1)
    cell = left.cell(pack, seq_len)
    document = {
        "format": FORMAT, "version": VERSION, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("softprune", "numpy", "torch", "transformers")}, "engine": left.meta["engine"],
        "pack": pack, "seq_len": seq_len, "tokens": cell.tokens, **cell.identity, "base": left.label,
        "halving": {label: halving(entries) for label, entries in found.items()}, "candidates": found,
    }  # fmt: skip
    write_whole(out, json.dumps(document) + "\n")
    plot(found, out.with_suffix(".svg"))
    Console().print(table(found))


if __name__ == "__main__":
    typer.run(main)
