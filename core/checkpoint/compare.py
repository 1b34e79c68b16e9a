"""One shard of a rewritten checkpoint against the source: hashed and compared in one pass over both."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from softprune.checkpoint.copying import BUFFER_BYTES, Report, Stopped, read_ranges
from softprune.checkpoint.families import Family
from softprune.checkpoint.headers import TensorIndex, TensorInfo
from softprune.checkpoint.places import place_of, renumbered
from softprune.checkpoint.side_files import MANIFEST
from softprune.errors import CheckpointError, SoftpruneError


@dataclass(frozen=True)
class Run:
    """Bytes that a new tensor has to hold: the source file's from `start` or, without a file, `fill` over and over."""

    file: Path | None
    start: int
    num_bytes: int
    fill: bytes = b""

    def chunks(self, buffer: bytearray) -> Iterator[memoryview]:
        """The bytes, in views of the buffer's length."""
        if self.file is not None:
            return read_ranges(self.file, self.start, self.num_bytes, buffer)
        data = memoryview(self.fill * (len(buffer) // len(self.fill)))
        return (data[: self.num_bytes - place] for place in range(0, self.num_bytes, len(data)))


@dataclass(frozen=True)
class Expected:
    """Where the new tensors' bytes have to come from.

    Attributes:
        index, family: the source.
        kept: decoder layer -> old ids kept, ascending.
        num_experts: experts a layer of the new checkpoint; what is more than kept is padding.
    """

    index: TensorIndex
    family: Family
    kept: Mapping[int, Sequence[int]]
    num_experts: int

    def runs(self, info: TensorInfo) -> Iterator[Run]:
        """The parts of a new tensor, in order; nothing for one that should not be there."""
        place = place_of(self.family, info.name)
        kept = self.kept.get(-1 if place.layer is None else place.layer, ())
        name = info.name
        if place.expert is not None:
            if place.expert >= len(kept):
                return
            name = renumbered(self.family, name, kept[place.expert])
        source = self.index.tensors.get(name)
        if source is None:
            return
        if not place.rows_are_experts:
            yield Run(source.shard, source.start, source.num_bytes)
            return
        row = source.num_bytes // source.shape[0]
        for old in kept:
            yield Run(source.shard, source.start + old * row, row)
        if self.num_experts > len(kept):
            is_bias = self.family.router_bias is not None and name == self.family.router_bias.format(layer=place.layer)
            # Zeros, and as BF16 a router bias of minus infinity.
            yield Run(None, 0, (self.num_experts - len(kept)) * row, b"\x80\xff" if is_bias else b"\0")


def compare_shard(
    shard: Path, new: TensorIndex, expected: Expected, stored: tuple[int, str] | None, report: Report, stop: threading.Event
) -> list[SoftpruneError]:
    """What is wrong with one shard.

    Args:
        shard: the new file.
        new: the new checkpoint.
        expected: what its tensors have to hold.
        stored: the file's size and SHA-256 by the manifest.
        report: told of bytes compared.
        stop: checked between tensors.

    Returns:
        A problem for each tensor with other bytes, and one if size or SHA-256 differ.

    Raises:
        Stopped: `stop` was set.
    """
    problems: list[SoftpruneError] = []
    infos = sorted((info for info in new.tensors.values() if info.shard == shard), key=lambda info: info.start)
    digest = hashlib.sha256()
    size = shard.stat().st_size
    for chunk in read_ranges(shard, 0, infos[0].start if infos else size):
        digest.update(chunk)
    mine, theirs = bytearray(BUFFER_BYTES), bytearray(BUFFER_BYTES)
    for info in infos:
        if stop.is_set():
            raise Stopped
        runs = list(expected.runs(info))
        if sum(run.num_bytes for run in runs) != info.num_bytes:
            # No such tensor, or another shape: a problem that is found by name. Its bytes are hashed all the same.
            runs = [Run(shard, info.start, info.num_bytes)]
        start = info.start
        for run in runs:
            for here, there in zip(read_ranges(shard, start, run.num_bytes, mine), run.chunks(theirs), strict=True):
                digest.update(here)
                if bytes(here) != bytes(there):
                    problems.append(_other_bytes(shard, info, run))
            start += run.num_bytes
        report(info.num_bytes)
    if stored is None or (size, digest.hexdigest()) != stored:
        says = "a file that it does not name" if stored is None else f"{stored[0]} bytes, SHA-256 {stored[1]}"
        problems.append(CheckpointError(str(shard), "", f"{size} bytes, SHA-256 {digest.hexdigest()}", f"{says}, by {MANIFEST}"))
    return problems


def _other_bytes(shard: Path, info: TensorInfo, run: Run) -> CheckpointError:
    origin = "those of padding" if run.file is None else f"the {run.num_bytes} of {run.file.name} from byte {run.start}"
    return CheckpointError(str(shard), info.name, "other bytes", origin)
