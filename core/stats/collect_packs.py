"""The packs that `softprune stats collect` replays: files, cut into blocks by the served model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprune.errors import InputError, shortened
from softprune.evaluate.packing import Blocks, pack_rows, read_rows


def load(files: Sequence[Path], tokenizer: str, seq_len: int, num_blocks: int | None) -> dict[str, Blocks]:
    """Blocks by tag, which is the file's name without its suffix.

    Args:
        files: Parquet files.
        tokenizer: a folder, or a name that Transformers knows.
        seq_len, num_blocks: as `pack_rows` takes them.

    Raises:
        PackError: a pack cannot be read, or is too small.
        InputError: two packs of one name, or no fast tokenizer.
    """
    names = [file.stem for file in files]
    for name in names:
        if names.count(name) > 1:
            raise InputError("--packs", "", f"two files named {name}", "a name of its own for each: statistics are kept apart by it")
    loaded = load_tokenizer(tokenizer)
    return {file.stem: pack_rows(read_rows(file), loaded, seq_len, num_blocks, str(file)) for file in files}


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer by Transformers.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        found = f"no tokenizer ({shortened(str(error))})"
        raise InputError(f"--tokenizer {name}", "", found, "a folder with one; without the option, the server's model") from None
    if not tokenizer.is_fast:
        raise InputError(f"--tokenizer {name}", "", f"{type(tokenizer).__name__}, which knows no positions in the text", "a fast tokenizer")
    return tokenizer
