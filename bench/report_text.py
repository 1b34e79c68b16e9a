"""A report's text: one table for each setting, and what its reader has to be told about them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from softprune.bench.readme_figures import markdown_table
from softprune.bench.report_rows import ENOUGH, Compared, Largest, Memory, Rows, Speed, by_setting

SPEEDS = ("model", "served", "batch", "tok/s", "spread", "repeats", "first token, s", "inter-token, ms")
COMPARED = ("B / A", "batch", "ratio", "95 % interval", "pairs", "", "roofline, A", "roofline, B")
LARGEST = ("model", "served", "KV tokens", "largest batch", "limit", "tok/s there", "repeats")
MEMORY = ("server", "weights", "KV cache", "CUDA graphs")


def markdown(rows: Rows) -> str:
    """All of it; the pictures that it names are those of `softprune.bench.report.write_report`."""
    parts = ["# Decode benchmark\n"]
    for number, speeds in enumerate(by_setting(rows.speeds), 1):
        parts.append(f"## {speeds[0].setting.text}\n\n{_speeds(speeds)}\n![tokens per second against batch](tok_s_{number}.svg)\n")
    for number, compared in enumerate(by_setting(rows.compared), 1):
        parts.append(f"## Compared: {compared[0].setting.text}\n\n{_compared(compared)}\n![ratios](ratio_{number}.svg)\n")
    for largest in by_setting(rows.largest):
        parts.append(f"## Largest batch: {largest[0].setting.text}\n\n{_largest(largest)}")
    if rows.memory:
        parts.append(f"## Memory, GiB\n\n{_memory(rows.memory)}\n![memory](memory.svg)\n")
    return "\n".join([*parts, *(f"{note}\n" for note in (*_general(rows), *rows.notes))])


def _speeds(speeds: Sequence[Speed]) -> str:
    table = []
    for one in sorted(speeds, key=lambda one: one.batch):
        spread = f"{one.spread:.1%}" if len(one.tok_s) > 1 else ""
        times = (_number(one.ttft_s, ".3f"), _number(one.inter_token_ms, ".2f"))
        speed = f"{one.median:,.1f}{_mark(one)}"
        table.append([one.model, one.variant, str(one.batch), speed, spread, str(len(one.tok_s)), *times])
    return markdown_table(SPEEDS, table)


def _compared(compared: Sequence[Compared]) -> str:
    table = []
    for one in compared:
        interval = "" if one.low is None or one.high is None else f"{one.low:.3f} to {one.high:.3f}"
        shares = (_number(share, ".0%") for share in one.shares)
        ratio = f"{one.median:.3f}{_mark(one)}"
        table.append([f"{one.b} / {one.a}", str(one.batch), ratio, interval, str(one.pairs), one.says, *shares])
    return markdown_table(COMPARED, table)


def _largest(largest: Sequence[Largest]) -> str:
    table = []
    for one in largest:
        speed = f"{median(one.tok_s):,.1f}{_mark(one)}" if one.tok_s else ""
        batch = _number(one.batch, "") if one.is_exact else f"at least {one.batch}"
        table.append([one.model, one.variant, _number(one.kv_tokens, ","), batch, one.limit, speed, str(len(one.tok_s))])
    return markdown_table(LARGEST, table)


def _memory(memory: Sequence[Memory]) -> str:
    return markdown_table(MEMORY, [[one.label, *(f"{gib:.2f}" for gib in (one.weights, one.kv, one.graphs))] for one in memory])


def _general(rows: Rows) -> list[str]:
    """Sentences about rows that are marked, and about what is not to be compared."""
    every: list[Speed | Compared | Largest] = [*rows.speeds, *rows.compared, *rows.largest]
    found = []
    if any(one.is_marked for one in every):
        found.append(f"†: fewer than {ENOUGH} repeats, so nothing is known of its noise; hollow in the pictures.")
    engines, gpus = (sorted({getattr(one.setting, name) for one in every}) for name in ("engine", "gpu"))
    if len(engines) > 1 or len(gpus) > 1:
        found.append(f"Measured on {', '.join(gpus)} with {', '.join(engines)}; each has tables and curves of its own.")
    if len({one.model for one in rows.speeds}) > 1:
        found.append("Curves are of different models where their names differ.")
    return found


def _mark(row: Speed | Compared | Largest) -> str:
    return " †" if row.is_marked else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
