"""Folders that appear under their name whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softprune.errors import CheckpointError


@contextmanager
def renamed_after(out: Path) -> Iterator[Path]:
    """Hand out an empty folder beside `out`, and give it that name once the block has ended well.

    What a killed run has left there is removed first. The folder is locked, so that two runs cannot share it; the
    lock ends with the process, however that ends.

    Args:
        out: the folder to make; missing parents are made.

    Raises:
        CheckpointError: it exists already, another process is writing it, or its parent cannot be written.
    """
    check_free(out)
    with _locked(out, make=True) as temporary:
        assert temporary is not None
        try:
            yield temporary
            sync_folder(temporary)
            check_free(out)
            temporary.rename(out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(out.parent)


def clear(out: Path) -> None:
    """Remove what a killed run that was to make `out` has left.

    Raises:
        CheckpointError: it is not dead.
    """
    with _locked(out, make=False) as temporary:
        if temporary:
            temporary.rmdir()


def check_free(out: Path) -> None:
    """Refuse a name that is taken.

    Raises:
        CheckpointError: something is there.
    """
    if os.path.lexists(out):
        raise CheckpointError(str(out), "", "a folder that exists already" if out.is_dir() else "a file of this name", "a new name")


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(out: Path, make: bool) -> Iterator[Path | None]:
    """The temporary folder of `out`, emptied, and this process's alone; None if there is none and it is not to be made."""
    temporary = out.with_name(f".{out.name}.writing")
    if not make and not temporary.is_dir():
        yield None
        return
    try:
        if make:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(exist_ok=True)
        handle = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(str(out), "", error.strerror or str(error), "a place that can be written") from None
    try:
        _lock(handle, temporary, out)
        for left in temporary.iterdir():
            _remove(left)
        yield temporary
    finally:
        os.close(handle)


def _lock(handle: int, temporary: Path, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(handle), os.stat(temporary))
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:
        raise CheckpointError(str(out), "", f"another process that writes it, in {temporary.name}", "one writer")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
