"""Writing files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_after(path: Path, text: str) -> Iterator[None]:
    """Write a text file beside `path` first, and put it in its place once the block has ended well.

    What can go wrong with writing goes wrong before the block; if the block raises, the old file stays.

    Args:
        path: in a folder that exists.
        text: what it is to hold.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files that only their owner can read.
        os.chmod(temporary, 0o644)
        yield
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file through a temporary one beside it; whatever goes wrong, the old file stays."""
    with written_after(path, text):
        pass
