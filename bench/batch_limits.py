"""Where a search for the largest batch begins and ends, and how many streams of a pass ran at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprune.bench.figures import Repeat
from softprune.bench.prompts import Workload


def most_together(result: Repeat) -> int:
    """The largest number of streams between their first and their last token at one time."""
    marks = [(stream.arrivals[0][0], 1) for stream in result.streams] + [(stream.arrivals[-1][0], -1) for stream in result.streams]
    most = now = 0
    for _, change in sorted(marks, key=lambda mark: (mark[0], -mark[1])):
        now += change
        most = max(most, now)
    return most


def cap_of(flags: Mapping[str, Any], max_running: int | None, most: int) -> tuple[int, str]:
    """The largest size to try, and what to call it."""
    each = flags.get("effective_max_running_requests_per_dp") or flags.get("max_running_requests")
    own = each * (flags.get("dp_size") or 1) if each else None
    caps = {"--max": most, "--max-running": max_running, "the engine's own max_running_requests": own}
    known = {name: value for name, value in caps.items() if value is not None}
    name = min(known, key=lambda cap: known[cap])
    return known[name], f"{name} = {known[name]}"


def start_of(start: int | None, kv_tokens: float | None, workload: Workload) -> tuple[int, int]:
    """The first size, and how far from it the second lies."""
    if start is not None or not kv_tokens:
        return start or 8, start or 8
    guess = max(1, int(kv_tokens) // (workload.prompt_tokens + workload.max_new_tokens))
    return guess, max(1, guess // 8)
