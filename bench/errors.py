"""What can go wrong while a benchmark measures, each with the request that it befell."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import aiohttp

from softprune.errors import SoftpruneError


@dataclass(eq=False)
class BenchmarkError(SoftpruneError):
    """A measurement that cannot be finished.

    Attributes:
        batch, repeat, stream: which request; None where it was none in particular.
        found, expected: as in the message.
        partial: what `decode.measure` would have returned, with the rows so far and `error`; None if it had not begun.
    """

    batch: int | None
    repeat: int | None
    stream: int | None
    found: str
    expected: str
    partial: dict[str, Any] | None = None

    def __reduce__(self) -> tuple[type[BenchmarkError], tuple[Any, ...]]:
        return type(self), (self.batch, self.repeat, self.stream, self.found, self.expected, self.partial)

    def __str__(self) -> str:
        where = ["benchmark"] if self.batch is None else [f"batch {self.batch}"]
        if self.repeat is not None:
            where.append(pass_name(self.repeat))
        if self.stream is not None:
            where.append(f"stream {self.stream}")
        return f"{', '.join(where)}: found {self.found}; expected {self.expected}"


class LengthError(BenchmarkError):
    """An answer or a prompt had fewer or more tokens than asked for, by the server's own count."""


class StallError(BenchmarkError):
    """No bytes came for longer than allowed."""


class ServerGoneError(BenchmarkError):
    """Nobody listens, or the connection ended before the answer did."""


class HttpStatusError(BenchmarkError):
    """The server answered with an HTTP error."""


class ServerReportedError(BenchmarkError):
    """The server sent an error, or no counts, inside an answer that began well."""


def pass_name(repeat: int) -> str:
    """ "repeat 2", or "warm-up 1" for pass 0."""
    return f"repeat {repeat}" if repeat > 0 else f"warm-up {1 - repeat}"


def gone(error: Exception) -> str:
    """What happened to a connection, without the host that aiohttp's own texts name."""
    cause = getattr(error, "os_error", None) or error
    number = getattr(cause, "errno", None)
    kinds = {
        aiohttp.ClientPayloadError: "an answer cut short",
        aiohttp.ServerDisconnectedError: "a connection closed before the answer",
        aiohttp.ClientConnectorError: "no connection",
    }
    kind = next((text for cls, text in kinds.items() if isinstance(error, cls)), "a broken connection")
    return f"{kind} ({os.strerror(number)})" if number else kind
