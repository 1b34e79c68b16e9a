"""Writing files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from softprune.errors import InputError


@contextmanager
def replaced_after(path: Path) -> Iterator[Path]:
    """Hand out a temporary file beside `path`, and put it in its place once the block has ended well; else the old file stays.

    Args:
        path: in a folder that exists.

    Raises:
        OSError: it cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # and not the temporary one's name
    try:
        os.close(handle)
        yield Path(temporary)
        # mkstemp makes files that only their owner can read, and so do libraries that write beside it and rename.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def written_after(path: Path, text: str) -> Iterator[None]:
    """Write a text file beside `path` first, and put it in its place once the block has ended well.

    What can go wrong with writing goes wrong before the block; if the block raises, the old file stays.

    Args:
        path: in a folder that exists.
        text: what it is to hold.
    """
    with replaced_after(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a text file through a temporary one beside it; whatever goes wrong, the old file stays."""
    with written_after(path, text):
        pass


def check_apart(out: str | Path, inputs: Iterable[str | Path | None], option: str = "--out") -> None:
    """Refuse to write over what is read.

    Raises:
        InputError: `out` is one of the inputs.
    """
    for path in inputs:
        if path is not None and os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path):
            raise InputError(option, "", f"{out}, which is read", "another file")


def digest_of(data: bytes) -> str:
    """SHA-256 as files name it: "sha256:" and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of_file(path: Path) -> str:
    """As `digest_of`, of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return "sha256:" + digest.hexdigest()
