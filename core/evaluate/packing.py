"""Packs of conversations -> blocks of token ids, with a mask of the tokens that count (spec/metrics.md 1.1 and 1.2).

A pack is a Parquet file with a column `text`, or JSON Lines with that key, one rendered Harmony conversation a row. Rows are read in the
file's order, never more than needed, so the same file, tokenizer and sizes give the same blocks; `rows_sha256` proves it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.errors import InputError, shortened
from softprune.evaluate.harmony import completion_spans

UNION = "UNION"
"""Name of the pseudo-pack that takes one row of each pack in turn."""


class PackError(InputError):
    """A pack that cannot be read, or that holds too little."""


@dataclass(frozen=True)
class Row:
    """One conversation as tokens, without the EOS id that packing puts after it.

    Attributes:
        ids: int32 [n].
        keep: bool [n]; True where the token overlaps text that the assistant wrote.
    """

    ids: NDArray[np.int32]
    keep: NDArray[np.bool_]


@dataclass(frozen=True)
class Blocks:
    """A packed part of a pack.

    Attributes:
        ids: int32 [num_blocks, seq_len].
        keep: bool [num_blocks, seq_len]; the first column is False, since nothing predicts it.
        row: int32 [num_blocks, seq_len]; the token's conversation, counted from 0 as read; an EOS id belongs to the one it ends.
        rows_seen: conversations read.
        rows_sha256: over each of them, as UTF-8 and a zero byte.
    """

    ids: NDArray[np.int32]
    keep: NDArray[np.bool_]
    row: NDArray[np.int32]
    rows_seen: int
    rows_sha256: str

    @property
    def num_kept(self) -> int:
        """Tokens that count."""
        return int(self.keep.sum())


def completion_ranges(keep: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Ranges [start, stop) of the tokens of one block that count, in order.

    Args:
        keep: bool [seq_len].
    """
    edges = np.flatnonzero(np.diff(keep.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def block_hashes(blocks: Blocks) -> list[str]:
    """What identifies each block: SHA-256, in 64 hexadecimal digits, over its ids (little-endian int32) and its mask (a byte a token)."""
    return [
        hashlib.sha256(ids.astype("<i4").tobytes() + keep.tobytes()).hexdigest() for ids, keep in zip(blocks.ids, blocks.keep, strict=True)
    ]


def blocks_sha256(hashes: Sequence[str]) -> str:
    """What identifies all blocks together: SHA-256, in 64 hexadecimal digits, over what `block_hashes` gives."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_rows(path: str | Path, column: str = "text") -> Iterator[str]:
    """The non-blank texts of a pack, in its order: of a Parquet file, or of JSON Lines (`.jsonl`: one object a line).

    Raises:
        PackError: no such file, neither of these, or no such column of texts.
    """
    name = str(path)
    try:
        for value in (_json_lines if Path(path).suffix == ".jsonl" else _parquet)(path, column):
            if value is not None and value.strip():
                yield value
    except OSError as error:
        raise PackError(name, "", error.strerror or str(error), "a readable file") from None


def _parquet(path: str | Path, column: str) -> Iterator[str | None]:
    """Row group by row group."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    name = str(path)
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise PackError(name, "", f"no Parquet ({error})", "a Parquet file, or JSON Lines named .jsonl") from None
    with file:
        if column not in file.schema_arrow.names:
            raise PackError(name, column, f"columns {', '.join(file.schema_arrow.names)}", f"a column {column}")
        kind = file.schema_arrow.field(column).type
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise PackError(name, column, f"type {kind}", "type string")
        for group in range(file.num_row_groups):
            for text in file.read_row_group(group, columns=[column]).column(0):
                yield text.as_py()


def _json_lines(path: str | Path, column: str) -> Iterator[str | None]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise PackError(str(path), f"line {number}", f"no JSON ({error})", f'an object such as {{"{column}": "…"}}') from None
            value = row.get(column) if isinstance(row, dict) else row
            if not isinstance(row, dict) or column not in row or not isinstance(value, str | None):
                raise PackError(str(path), f"line {number}.{column}", shortened(value), "a text")
            yield value


def union(packs: Sequence[Iterable[str]]) -> Iterator[str]:
    """One row of each in turn, in the order given; an exhausted one is passed over."""
    open_packs = [iter(pack) for pack in packs]
    while open_packs:
        for pack in list(open_packs):
            try:
                yield next(pack)
            except StopIteration:
                open_packs.remove(pack)


def shuffled(rows: Iterable[str], seed: int) -> Iterator[str]:
    """Rows in another order, which the seed and each row's text decide (spec/metrics.md 3.4); holds all of them in memory.

    Args:
        rows: conversations.
        seed: of the order; another seed puts other rows into the first blocks.
    """
    return iter(sorted(rows, key=lambda text: hashlib.blake2b(f"{seed}\n{text}".encode(errors="ignore"), digest_size=8).digest()))


def encode_row(text: str, tokenizer: Any) -> Row:
    """Tokenise one conversation and mark what the assistant wrote.

    Args:
        text: rendered Harmony.
        tokenizer: a fast Transformers tokenizer.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    keep = np.zeros(len(offsets), np.bool_)
    for start, end in completion_spans(text):
        keep |= (ends > start) & (starts < end)
    # (0, 0) is what tokenizers give to ids that stand for no text.
    keep &= offsets.any(axis=1)
    return Row(np.asarray(encoded["input_ids"], np.int32), keep)


def pack_rows(rows: Iterable[str], tokenizer: Any, seq_len: int, num_blocks: int | None, source: str) -> Blocks:
    """Join conversations, an EOS id after each, and cut blocks of exactly `seq_len` ids.

    Conversations cross the blocks' borders; what is left of the last one is dropped. No row is read once the blocks are full.

    Args:
        rows: conversations in order, e.g. `read_rows(path)` or `union([...])`.
        tokenizer: a fast Transformers tokenizer with an EOS id.
        seq_len: ids in a block.
        num_blocks: how many; None takes all rows and whatever number of whole blocks they fill.
        source: what the rows are, for errors.

    Raises:
        PackError: fewer than `num_blocks` blocks, or not even one; a tokenizer without an EOS id.
    """
    if tokenizer.eos_token_id is None:
        raise PackError(source, "tokenizer", "no EOS token", "a tokenizer with one, put after each conversation")
    digest, rows_seen, length = hashlib.sha256(), 0, 0
    ids: list[NDArray[np.int32]] = []
    keep: list[NDArray[np.bool_]] = []
    lengths: list[int] = []
    reading = iter(rows)
    while num_blocks is None or length < num_blocks * seq_len:
        if (text := next(reading, None)) is None:
            break
        digest.update(text.encode("utf-8", "ignore") + b"\0")
        row = encode_row(text, tokenizer)
        ids += [row.ids, np.array([tokenizer.eos_token_id], np.int32)]
        keep += [row.keep, np.zeros(1, np.bool_)]
        lengths.append(len(row.ids) + 1)
        rows_seen, length = rows_seen + 1, length + lengths[-1]
    found = length // seq_len
    if found < (num_blocks or 1):
        tokens = f"{found} blocks ({rows_seen} rows, {length} tokens)"
        raise PackError(source, "", tokens, f"{num_blocks or 'at least 1'} blocks of {seq_len} tokens")
    shape = (num_blocks or found, seq_len)
    end = shape[0] * seq_len
    kept = np.concatenate(keep)[:end].reshape(shape)
    kept[:, 0] = False
    row_of = np.repeat(np.arange(rows_seen, dtype=np.int32), lengths)
    return Blocks(np.concatenate(ids)[:end].reshape(shape), kept, row_of[:end].reshape(shape), rows_seen, digest.hexdigest())
