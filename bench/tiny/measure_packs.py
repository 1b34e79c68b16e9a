"""The held-out packs as blocks, and what identifies a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softprune.bench.tiny import CONTEXT, PACKS
from softprune.errors import InputError
from softprune.evaluate import packing
from softprune.evaluate.packing import UNION, Blocks, pack_rows, read_rows, union


def load_tokenizer(folder: Path) -> Any:
    """The fast Transformers tokenizer of a folder.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise InputError(str(folder), "tokenizer.json", "no such file", "a folder with a tokenizer")
    return AutoTokenizer.from_pretrained(folder)


def pack_files(folder: Path) -> dict[str, Path]:
    """The file of each pack."""
    return {name: folder / f"{name}.parquet" for name in PACKS}


def pack_blocks(folder: Path, tokenizer: Any, num_blocks: int | None, seq_len: int = CONTEXT) -> dict[str, Blocks]:
    """Blocks of each pack.

    Blocks don't depend on how many are asked for: fewer are the first ones of more.

    Raises:
        PackError: a pack cannot be read, or is too small.
    """
    files = pack_files(folder)
    return {name: pack_rows(read_rows(path), tokenizer, seq_len, num_blocks, str(path)) for name, path in files.items()}


def heldout_blocks(folder: Path, tokenizer: Any, num_blocks: int | None, seq_len: int = CONTEXT) -> dict[str, Blocks]:
    """Blocks of each pack and of UNION, as `pack_blocks` makes them; raises as that."""
    rows = union([read_rows(path) for path in pack_files(folder).values()])
    joined = pack_rows(rows, tokenizer, seq_len, num_blocks, f"{UNION} of {folder}")
    return {**pack_blocks(folder, tokenizer, num_blocks, seq_len), UNION: joined}


def block_hashes(blocks: Blocks) -> list[str]:
    """The first 16 hexadecimal digits of each block's hash."""
    return [digest[:16] for digest in packing.block_hashes(blocks)]
