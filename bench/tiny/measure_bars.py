"""The bars that the small model has to clear, each with what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

RATIO, SHARE, JS, RISE, STORAGE, CALLS, CALL_PROMPTS, SAMPLES = 0.7, 0.002, 0.03, 0.15, 0.02, 0.8, 200, 8


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: what is measured.
        value: what was found; None if it was not measured.
        relation, limit: what it has to be.
    """

    name: str
    value: float | None
    relation: Literal["<=", ">="]
    limit: float

    @property
    def passed(self) -> bool | None:
        """None if it was not measured."""
        if self.value is None:
            return None
        return self.value <= self.limit if self.relation == "<=" else self.value >= self.limit

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"name": self.name, "value": self.value, "bar": f"{self.relation} {self.limit:g}", "passed": self.passed}


def bars(document: dict[str, Any]) -> list[Bar]:
    """The bars of a document of `measure`; a part that is None there was not measured."""
    return list(_bars(document))


def _bars(document: dict[str, Any]) -> Iterator[Bar]:
    for pack, entry in document["perplexity"].items():
        yield Bar(f"perplexity over the 5-gram's, {pack}", entry["ratio"], "<=", RATIO)
    routing, pruning, storage = document["routing"], document["pruning"], document["storage"]
    yield Bar("smallest share of an expert in any layer, UNION", min(routing["min_share"]), ">=", SHARE)
    for pair, entry in routing["js"].items():
        yield Bar(f"JS divergence of expert histograms (nats), {pair}", entry["mean"], ">=", JS)
    yield Bar(f"rise of UNION perplexity with {pruning['num_kept']} random experts kept", pruning["rise"], ">=", RISE)
    yield Bar("MXFP4 against BF16, UNION perplexity, relative", storage and abs(storage["relative"]), "<=", STORAGE)
    second = document["second_seed"]
    yield Bar("second seed orders the packs the same way (1: yes)", second and float(second["same_order"]), ">=", 1)
    calls, samples = document["tool_calls"], document["samples"]
    yield Bar("tool calls that parse, with a declared function", calls and calls["valid"], ">=", CALLS)
    yield Bar("tool prompts tried", calls and calls["prompts"], ">=", CALL_PROMPTS)
    yield Bar("samples of the pack with fewest", samples and min(len(entries) for entries in samples.values()), ">=", SAMPLES)


def table(found: list[Bar]) -> Table:
    """For the terminal."""
    rows = Table("bar", "value", "has to be", "", title="the small model's bars")
    for bar in found:
        word = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: "[yellow]not measured[/]"}[bar.passed]
        rows.add_row(bar.name, "–" if bar.value is None else f"{bar.value:.4g}", f"{bar.relation} {bar.limit:g}", word)
    return rows
