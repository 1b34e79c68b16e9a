"""What a report shows: speeds, ratios, largest batches and memory.

What was measured with another model, engine, GPU or workload never ends up in one row or curve: all of them are part of what a row is.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from softprune.bench.figures import spread

ENOUGH = 3
"""Repeats, or pairs, below which a row is marked."""


Served = tuple[str | None, str | None]
"""Hash of the mask, and the model's fingerprint."""


@dataclass(frozen=True, order=True)
class Setting:
    """What has to be the same for two speeds to share a picture.

    Attributes:
        engine, gpu: name and version; name.
        prompt_tokens, max_new_tokens: of every request.
        stream: whether answers were streamed; then the speed is that of the time in which all streams decode, else of whole answers.
    """

    engine: str
    gpu: str
    prompt_tokens: int
    max_new_tokens: int
    stream: bool

    @property
    def figure(self) -> str:
        """The speed that is shown, as raw files call it."""
        return "decode_tok_s" if self.stream else "total_tok_s"

    @property
    def text(self) -> str:
        """For a heading."""
        how = "while all streams decode" if self.stream else "whole answers"
        return f"{self.engine}, {self.gpu}, {self.prompt_tokens:,} + {self.max_new_tokens:,} tokens, {how}"


@dataclass(frozen=True)
class Speed:
    """One model and mask at one batch size.

    Attributes:
        setting, model, variant, batch: what was measured.
        served: the hashes of mask and fingerprint, None where nobody told; other ones are another row even if their words are the same.
        tok_s: of every repeat.
        ttft_s, inter_token_ms: medians over repeats; None without streaming.
        flags: server flags of each document that repeats came from; more than one differs only in what no figure depends on, or is noted.
    """

    setting: Setting
    model: str
    variant: str
    batch: int
    served: Served
    tok_s: tuple[float, ...]
    ttft_s: float | None = None
    inter_token_ms: float | None = None
    flags: tuple[str, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.tok_s)

    @property
    def spread(self) -> float:
        """(max - min) / median."""
        found = spread(self.tok_s)
        return found["spread"] if found else 0.0

    @property
    def is_marked(self) -> bool:
        """Too few repeats."""
        return len(self.tok_s) < ENOUGH


@dataclass(frozen=True)
class Compared:
    """B over A at one batch size; `low` and `high` are a 95 % interval, None of too few pairs. `shares` are of the rooflines of A, B."""

    setting: Setting
    a: str
    b: str
    batch: int
    pairs: int
    median: float
    low: float | None
    high: float | None
    says: str
    shares: tuple[float | None, float | None] = (None, None)

    @property
    def is_marked(self) -> bool:
        return self.pairs < ENOUGH


@dataclass(frozen=True)
class Largest:
    """The largest batch of a server, and its speed there.

    Attributes:
        served: as of `Speed`.
        batch: None if not even the smallest ran, or none was found in time.
        is_exact: whether the next size is known not to run, or none was to be tried.
    """

    setting: Setting
    model: str
    variant: str
    served: Served
    kv_tokens: int | None
    batch: int | None
    limit: str
    tok_s: tuple[float, ...]
    is_exact: bool = True

    @property
    def is_marked(self) -> bool:
        return len(self.tok_s) < ENOUGH


@dataclass(frozen=True)
class Memory:
    """GiB of a server, as its engine reports them."""

    label: str
    weights: float
    kv: float
    graphs: float


@dataclass
class Rows:
    """All that some raw files hold.

    Attributes:
        notes: sentences that the report has to say.
    """

    speeds: list[Speed] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    largest: list[Largest] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


Row = TypeVar("Row", Speed, Compared, Largest)


def by_setting(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in lists of one setting each, in the order in which these come."""
    return [[row for row in rows if row.setting == setting] for setting in dict.fromkeys(row.setting for row in rows)]
