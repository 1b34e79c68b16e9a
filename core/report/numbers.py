"""Numbers as a report writes them: true minus signs, thin tables, "–" where there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

NONE = "–"
Form = Callable[[float], str]


def number(value: float | None, digits: int = 4) -> str:
    """So many significant digits, trailing zeros kept; integers and large numbers with thousands separated."""
    if value is None or math.isnan(value):
        return NONE
    if isinstance(value, int) or abs(value) >= 10**digits:
        return _minus(f"{value:,.0f}")
    return _minus(f"{value:#.{digits}g}".rstrip("."))


def fixed(value: float | None, places: int = 4) -> str:
    """So many decimal places."""
    return NONE if value is None else _minus(f"{value:.{places}f}")


def signed(value: float | None, places: int = 4) -> str:
    """A difference: always with its sign."""
    return NONE if value is None else _minus(f"{value:+.{places}f}")


def percent(value: float | None, places: int = 1) -> str:
    """A share as a percentage."""
    return NONE if value is None else _minus(f"{100 * value:.{places}f} %")


def signed_percent(value: float | None, places: int = 1) -> str:
    """A relative difference as a percentage."""
    return NONE if value is None else _minus(f"{100 * value:+.{places}f} %")


def points(value: float | None, places: int = 3) -> str:
    """A difference of shares, in percentage points."""
    return NONE if value is None else _minus(f"{100 * value:+.{places}f} pp")


def interval(delta: Mapping[str, Any] | None, form: Form) -> str:
    """The interval of {"value", "low", "high"}, e.g. "+0.180 to +0.245"; "–" where there is none."""
    if delta is None or delta.get("low") is None or delta.get("high") is None:
        return NONE
    return f"{form(delta['low'])} to {form(delta['high'])}"


def short(text: str | None, length: int = 15) -> str:
    """A hash, cut as the command line cuts it."""
    return "none" if text is None else text if len(text) <= length else f"{text[:length]}…"


def shortened_hashes(text: str) -> str:
    """A sentence whose SHA-256 sums are cut: as many digits as tell them apart."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", text)


def kept(num_kept: list[int] | None, experts: int | None = None) -> str:
    """Experts kept a layer: "24", "8 to 24", "24 of 32", or "all"."""
    if not num_kept:
        return "all" if experts is None else f"all {experts}"
    low, high = min(num_kept), max(num_kept)
    return (f"{low}" if low == high else f"{low} to {high}") + ("" if experts is None else f" of {experts}")


def plural(count: int, noun: str, ending: str = "s") -> str:
    """ "1 check", "3 checks"."""
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def _minus(text: str) -> str:
    return text.replace("-", "−")
