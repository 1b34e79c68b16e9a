"""What a sweep found, as a table: one line for each mask, over all orders of the packs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from softprune.evaluate.gate_result import COLOURS
from softprune.evaluate.packing import UNION


def table(document: Mapping[str, Any]) -> Table:
    """The table of a `sweep.json`.

    Perplexities are of UNION, where it was scored: means over data seeds, with their range where there are several. A mask's verdicts are
    counted.
    """
    rows = [key for entry in document["cells"][:1] for key in entry["ppl"]]
    rows = [key for key in rows if key.startswith(f"{UNION}@")] or rows
    seeds = len(document["data_seeds"])
    shown = Table(
        "mask",
        *(f"PPL {row}" for row in rows),
        "verdict" if seeds == 1 else f"verdict ({seeds} seeds)",
        "decode over base",
        "front",
        box=None,
    )
    for column in shown.columns[1:-2]:
        column.justify = "right"
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for entry in document["cells"]:
        by_label.setdefault(entry["label"], []).append(entry)
    for label, entries in by_label.items():
        perplexities = [_mean([entry["ppl"][row] for entry in entries]) for row in rows]
        decode = next((entry["decode"] for entry in entries if entry["decode"]), None)
        front = "*" if any(entry["pareto"] for entry in entries) else ""
        shown.add_row(label, *perplexities, _verdicts([entry["verdict"] for entry in entries]), _speed(decode), front)
    return shown


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def _verdicts(verdicts: Sequence[str]) -> str:
    counts = {verdict: verdicts.count(verdict) for verdict in COLOURS if verdict in verdicts}
    return ", ".join(f"[{COLOURS[verdict]}]{verdict}[/]{'' if len(verdicts) == 1 else f' {count}'}" for verdict, count in counts.items())


def _speed(decode: Mapping[str, Any] | None) -> str:
    if decode is None:
        return "-"
    interval = "" if decode["low"] is None else f" ({decode['low']:.3f} to {decode['high']:.3f})"
    return f"{decode['over_base']:.3f}{interval}"
