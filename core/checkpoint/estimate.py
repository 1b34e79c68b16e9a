"""How long a rewrite will take, from a small part of it that is really done: read from the disk, hashed, written, forced out, deleted."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from softprune.checkpoint.copying import in_parallel, write_pieces
from softprune.checkpoint.plan import Copied, Piece, RewritePlan
from softprune.errors import CheckpointError

PROBE_BYTES = 128_000_000
"""Bytes that each worker of a probe writes."""


@dataclass(frozen=True)
class Estimate:
    """What a probe found.

    Attributes:
        probed_bytes, probed_seconds: the probe itself.
        seconds: for the whole rewrite at that speed, without verification.
    """

    probed_bytes: int
    probed_seconds: float
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Speed of the probe."""
        return self.probed_bytes / self.probed_seconds


def estimate(plan: RewritePlan, folder: Path, workers: int) -> Estimate:
    """Time a part of a rewrite. What it reads is dropped from the page cache first, since a large source is not in it.

    Args:
        plan: the rewrite.
        folder: where it will be written; holds a temporary folder for a moment.
        workers: as the rewrite will have.

    Raises:
        CheckpointError: the folder cannot be written, or the source cannot be read.
    """
    jobs = list(_parts(plan, min(workers, len(plan.shards))))
    for piece in (piece for job in jobs for piece in job):
        _drop_from_cache(piece)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".softprune-probe-") as place:

            def write(job: tuple[int, list[Piece]], stop: threading.Event) -> None:
                write_pieces(Path(place) / str(job[0]), b"", job[1], lambda num_bytes: None, stop)

            begun = time.monotonic()
            in_parallel(list(enumerate(jobs)), write, lambda job: 0, len(jobs))
            seconds = time.monotonic() - begun
    except OSError as error:
        raise CheckpointError(
            str(folder), "", error.strerror or str(error), "a folder that can be written, for a probe of the disk"
        ) from None
    probed = sum(piece.num_bytes for job in jobs for piece in job)
    return Estimate(probed, seconds, plan.bytes_written * seconds / probed)


def _parts(plan: RewritePlan, number: int) -> Iterator[list[Piece]]:
    """So many lists of pieces, of `PROBE_BYTES` at most, from places that are equally far apart in the plan."""
    pieces = [piece for tensor in plan.tensors for piece in tensor.pieces]
    for part in range(number):
        skip, room, chosen = plan.payload_bytes * part // number, PROBE_BYTES, list[Piece]()
        for piece in pieces:
            if skip > 0:
                skip -= piece.num_bytes
                continue
            if not room:
                break
            size = min(piece.num_bytes, room)
            chosen.append(Copied(piece.file, piece.start, size) if isinstance(piece, Copied) else piece)
            room = max(0, room - piece.num_bytes)
        yield chosen


def _drop_from_cache(piece: Piece) -> None:
    if isinstance(piece, Copied):
        with open(piece.file, "rb") as file:
            os.posix_fadvise(file.fileno(), piece.start, piece.num_bytes, os.POSIX_FADV_DONTNEED)
