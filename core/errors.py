"""The errors that users see.

Every message names the file, the field, what was found and what was expected, because the
reader is usually looking at a server that refused to start.
"""

from __future__ import annotations

from dataclasses import dataclass


class SoftpruneError(Exception):
    """Base class: catching it catches everything that softprune raises on purpose."""


def shortened(value: object) -> str:
    """A value as an error may show it: its repr, cut at 78 characters."""
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"


def of_system(error: OSError) -> str:
    """What the operating system refused, as errors of ours say it."""
    file = error.filename2 or error.filename
    return f"{file}: found {error.strerror or error}; expected a place that can be read, or written" if file else str(error)


@dataclass
class InputError(SoftpruneError):
    """A file that a user gave is not what it should be.

    Attributes:
        file: the file's path as the user gave it, or a description such as "request body".
        field: the field inside it, e.g. `keep[3]`; "" for the file as a whole.
        found: what stands there.
        expected: what should stand there.
    """

    file: str
    field: str
    found: str
    expected: str

    def __reduce__(self) -> tuple[type[InputError], tuple[str, ...]]:
        return type(self), (self.file, self.field, self.found, self.expected)

    def __str__(self) -> str:
        where = f"{self.file}: {self.field}" if self.field else self.file
        return f"{where}: found {self.found}; expected {self.expected}"


class MaskError(InputError):
    """An expert mask that cannot be used, by itself or for the model at hand."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or whose architecture is not supported."""


class RefusedError(SoftpruneError):
    """A server was asked for something that softprune has not proven, so it does not start."""


class SeamError(RefusedError):
    """A place in an engine that softprune hooks into is missing or has changed.

    Attributes:
        seam: the seam's name, as `seams.py` of the extension lists it.
        engine: engine name and version, e.g. "vLLM 0.32.0".
    """

    def __init__(self, seam: str, engine: str, detail: str) -> None:
        super().__init__(f"seam {seam!r} does not hold in {engine}: {detail}. softprune refuses to serve a mask that it cannot apply.")
        self.seam = seam
        self.engine = engine
        self.detail = detail

    def __reduce__(self) -> tuple[type[SeamError], tuple[str, ...]]:
        return type(self), (self.seam, self.engine, self.detail)
