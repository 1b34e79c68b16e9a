"""Moving bytes: planned pieces into a new file, hashed on the way, through one small buffer for each worker.

Reading, hashing and writing all release the interpreter's lock, so workers run on cores of their own.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from softprune.checkpoint.plan import Copied, Filled, Piece
from softprune.errors import CheckpointError, SoftpruneError

BUFFER_BYTES = 512 << 10
"""Bytes that a worker holds; half a core's second-level cache, so that they are hashed and written from there."""

AHEAD = 32
"""Buffers' worth of bytes that the disk is asked for before they are needed."""

FLUSH_BYTES, FLUSH_LAG = 16 << 20, 16
"""Bytes after which the disk is set to work, and how many such rounds it gets before they leave the page cache."""

WORKERS = min(4, os.cpu_count() or 1)
"""Files handled at a time unless told otherwise: SHA-256 takes a core each."""

REPORT_BYTES = 32 * BUFFER_BYTES
"""Bytes between two reports of progress."""

Report = Callable[[int], None]
"""Called with the bytes that were handled since the last call; from any worker."""


class Stopped(SoftpruneError):
    """Another worker failed, so this one gave up."""


def write_pieces(path: Path, head: bytes, pieces: Iterable[Piece], report: Report, stop: threading.Event) -> str:
    """Make a file of `head` and pieces, on the disk when this returns.

    Args:
        path: the new file.
        head: its first bytes.
        pieces: what follows.
        report: told of progress.
        stop: checked between buffers.

    Returns:
        The file's SHA-256, hexadecimal.

    Raises:
        CheckpointError: a source file ends early, or the operating system refuses to read or write.
        Stopped: `stop` was set.
    """
    digest = hashlib.sha256(head)
    since, written = 0, len(head)
    try:
        with open(path, "xb", buffering=0) as file:
            _write(file.fileno(), head)
            for chunk in _chunks(pieces):
                if stop.is_set():
                    raise Stopped
                digest.update(chunk)
                _write(file.fileno(), chunk)
                since, written = since + len(chunk), written + len(chunk)
                if written // FLUSH_BYTES > (written - len(chunk)) // FLUSH_BYTES:
                    _flush(file.fileno(), written)
                if since >= REPORT_BYTES:
                    report(since)
                    since = 0
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            str(error.filename or path), "", error.strerror or str(error), "a file that can be read and written"
        ) from None
    report(since)
    return digest.hexdigest()


def merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same bytes in fewer pieces: those that are neighbours in a file become one."""
    last: Copied | None = None
    for piece in pieces:
        if last and isinstance(piece, Copied) and piece.file == last.file and piece.start == last.start + last.num_bytes:
            last = Copied(last.file, last.start, last.num_bytes + piece.num_bytes)
            continue
        if last:
            yield last
        last = piece if isinstance(piece, Copied) else None
        if isinstance(piece, Filled):
            yield piece
    if last:
        yield last


def read_ranges(file: Path, start: int, num_bytes: int, buffer: bytearray | None = None) -> Iterator[memoryview]:
    """A file's bytes from `start`, in views of one buffer: all but the last fill it, and each is overwritten by the next.

    Raises:
        CheckpointError: the file ends early.
        OSError: it cannot be read.
    """
    whole = memoryview(bytearray(min(BUFFER_BYTES, num_bytes)) if buffer is None else buffer)
    with open(file, "rb", buffering=0) as source:
        for place in range(start, start + num_bytes, len(whole) or 1):
            view, done = whole[: start + num_bytes - place], 0
            while done < len(view):
                got = os.preadv(source.fileno(), [view[done:]], place + done)
                if not got:
                    raise CheckpointError(str(file), "", f"{place + done} bytes", f"at least {start + num_bytes}, as its header says")
                done += got
            yield view


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    items: Sequence[Item], work: Callable[[Item, threading.Event], Result], size: Callable[[Item], int], workers: int
) -> list[Result]:
    """`work(item, stop)` for every item in so many threads, the largest first; results in the items' order.

    Raises:
        Exception: the first that `work` raised; `stop` is set then, for the others to give up.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        order = sorted(range(len(items)), key=lambda i: -size(items[i]))
        futures = {i: pool.submit(work, items[i], stop) for i in order}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            failed = [error for future in done if (error := future.exception()) and not isinstance(error, Stopped)]
            if failed:
                raise failed[0]
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        return [futures[i].result() for i in range(len(items))]


def _chunks(pieces: Iterable[Piece]) -> Iterator[memoryview]:
    buffer = bytearray(BUFFER_BYTES)
    for piece in _asked_for(_blocks(merged(pieces))):
        if isinstance(piece, Copied):
            yield from read_ranges(piece.file, piece.start, piece.num_bytes, buffer)
        else:
            fill = memoryview(piece.pattern * (min(BUFFER_BYTES, piece.num_bytes) // len(piece.pattern)))
            for start in range(0, piece.num_bytes, len(fill)):
                yield fill[: piece.num_bytes - start]


def _flush(handle: int, written: int) -> None:
    """Start to write the last `FLUSH_BYTES` to the disk, and drop what was started some time ago from the page cache.

    A checkpoint fills the page cache: without this, writers spend their time on finding free pages (the 20B shape to 24 experts with
    24 GiB of memory: 15.2 s instead of 7.6), and the source, or what a server beside has cached, is pushed out.
    """
    begin = written // FLUSH_BYTES * FLUSH_BYTES - FLUSH_BYTES
    for start in (begin, begin - FLUSH_LAG * FLUSH_BYTES):
        if start >= 0:
            os.posix_fadvise(handle, start, FLUSH_BYTES, os.POSIX_FADV_DONTNEED)


def _blocks(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same bytes in pieces of a buffer's size at most."""
    for piece in pieces:
        if isinstance(piece, Filled):
            yield piece
        else:
            for done in range(0, piece.num_bytes, BUFFER_BYTES):
                yield Copied(piece.file, piece.start + done, min(BUFFER_BYTES, piece.num_bytes - done))


def _asked_for(blocks: Iterable[Piece]) -> Iterator[Piece]:
    """The blocks, each asked of the disk `AHEAD` blocks early: experts lie apart, so the kernel does not foresee which comes next."""
    waiting: deque[Piece] = deque()
    files: dict[Path, int] = {}
    try:
        for block in blocks:
            if isinstance(block, Copied):
                if block.file not in files:
                    files[block.file] = os.open(block.file, os.O_RDONLY)
                os.posix_fadvise(files[block.file], block.start, block.num_bytes, os.POSIX_FADV_WILLNEED)
            waiting.append(block)
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting
    finally:
        for handle in files.values():
            os.close(handle)


def _write(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
