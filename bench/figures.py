"""What a benchmark found: one answered request, one pass, and the row that sums up the passes of a batch size.

Nothing here touches the network or the clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stream:
    """One answered request; times are seconds since the pass's first send.

    Attributes:
        stream: index in the batch.
        prompt_tokens, cached_tokens, completion_tokens: counted by the server; cached_tokens None if it does not say.
        sent_s, ended_s: request handed to its connection; last byte.
        arrivals: (time, tokens so far) whenever bytes brought tokens, once for all tokens that came together; () without streaming.
    """

    stream: int
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    sent_s: float
    ended_s: float
    arrivals: tuple[tuple[float, int], ...]

    @property
    def ttft_s(self) -> float | None:
        """Seconds from send to first token; None without streaming."""
        return self.arrivals[0][0] - self.sent_s if self.arrivals else None

    @property
    def tok_s(self) -> float | None:
        """Tokens after the first arrival over the time from first to last arrival.

        (n-1)/(last - first) where the first arrival is one token, as it is unless a server holds the first one back.
        None without streaming or with a single arrival.
        """
        if len(self.arrivals) < 2:
            return None
        (first, head), (last, total) = self.arrivals[0], self.arrivals[-1]
        return (total - head) / (last - first)

    @cached_property
    def inter_token_ms(self) -> list[float]:
        """One value a token after the first arrival: its arrival's gap divided by the tokens that came in it."""
        values: list[float] = []
        for (before, had), (now, has) in zip(self.arrivals, self.arrivals[1:], strict=False):
            values += [(now - before) / (has - had) * 1e3] * (has - had)
        return values

    def record(self) -> dict[str, Any]:
        """Raw figures, JSON-ready."""
        record = asdict(self)
        del record["arrivals"]
        arrivals = {"first_token_s": self.arrivals[0][0], "last_token_s": self.arrivals[-1][0]} if self.arrivals else {}
        own = {"ttft_s": self.ttft_s, "tok_s": self.tok_s, "inter_token_ms": quantiles(self.inter_token_ms, 50, 90, 99)}
        return {**record, **arrivals, "num_arrivals": len(self.arrivals), **own}


@dataclass(frozen=True)
class Repeat:
    """One pass: all streams of a batch.

    Attributes:
        batch, repeat: which one.
        streams: by index.
        client_cpu_share: this process's CPU time over wall time; near 1, the client and not the server was measured.
        client_late_s: longest time by which this process ran later than it wanted to, since others had the processor or it was busy itself;
            arrivals meanwhile were seen too late.
    """

    batch: int
    repeat: int
    streams: tuple[Stream, ...]
    client_cpu_share: float
    client_late_s: float

    @property
    def wall_s(self) -> float:
        """Seconds from the first send to the last byte."""
        return max(stream.ended_s for stream in self.streams) - min(stream.sent_s for stream in self.streams)

    @property
    def total_tok_s(self) -> float:
        """All generated tokens over wall_s; prefill is in it."""
        return sum(stream.completion_tokens for stream in self.streams) / self.wall_s

    @property
    def decode_tok_s(self) -> float | None:
        """Speed once every stream decodes.

        With t the time of the last stream's first token: tokens of all streams that arrived after t, over the time from t to
        the last token of all. None without streaming, or if nothing arrived after t.
        """
        if not all(stream.arrivals for stream in self.streams):
            return None
        start = max(stream.arrivals[0][0] for stream in self.streams)
        end = max(stream.arrivals[-1][0] for stream in self.streams)
        before = sum(max(has for at, has in stream.arrivals if at <= start) for stream in self.streams)
        after = sum(stream.arrivals[-1][1] for stream in self.streams) - before
        return after / (end - start) if after else None

    def figures(self) -> dict[str, Any]:
        """All figures and raw streams, JSON-ready; those that need streaming are None without it."""
        speeds = [stream.tok_s for stream in self.streams if stream.tok_s is not None]
        firsts = [stream.ttft_s for stream in self.streams if stream.ttft_s is not None]
        ranged = {"p50": statistics.median(speeds), "min": min(speeds), "max": max(speeds)} if speeds else None
        return {
            "repeat": self.repeat,
            "wall_s": self.wall_s,
            "total_tok_s": self.total_tok_s,
            "decode_tok_s": self.decode_tok_s,
            "per_stream_tok_s": ranged,
            "ttft_s": {**(quantiles(firsts, 50, 90, 99) or {}), "max": max(firsts)} if firsts else None,
            "inter_token_ms": quantiles((ms for stream in self.streams for ms in stream.inter_token_ms), 50, 90, 99),
            "client_cpu_share": self.client_cpu_share,
            "client_late_s": self.client_late_s,
            "streams": [stream.record() for stream in self.streams],
        }


def quantiles(values: Iterable[float], *percents: int) -> dict[str, float] | None:
    """{"p50": …} by linear interpolation between the nearest values; None without values."""
    known = list(values)
    if not known:
        return None
    return {f"p{percent}": float(value) for percent, value in zip(percents, np.percentile(known, percents), strict=True)}


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median, min, max and spread = (max - min) / median over repeats; None unless every repeat has a value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    median = statistics.median(known)
    return {"median": median, "min": min(known), "max": max(known), "spread": (max(known) - min(known)) / median}


def summary(batch: int, repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the results, from `Repeat.figures()` of its repeats."""
    return {
        "batch": batch,
        "total_tok_s": spread([repeat["total_tok_s"] for repeat in repeats]),
        "decode_tok_s": spread([repeat["decode_tok_s"] for repeat in repeats]),
        "ttft_p50_s": spread([(repeat["ttft_s"] or {}).get("p50") for repeat in repeats]),
        "inter_token_p50_ms": spread([(repeat["inter_token_ms"] or {}).get("p50") for repeat in repeats]),
        "repeats": list(repeats),
    }
