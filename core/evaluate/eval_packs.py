"""The blocks that an evaluation scores: each pack, and UNION of all, at each block length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from softprune.errors import InputError
from softprune.evaluate.packing import UNION, Blocks, PackError, pack_rows, read_rows, shuffled, union
from softprune.stats.collect_packs import load_tokenizer

BlockForm = Literal["L", "L+1"]
"""Blocks of L ids, or of L + 1, of which L are predicted (spec/metrics.md 1.1); never comparable with one another."""
_SAMPLE_CHARACTERS = 4_000
"""Of each file, for comparing tokenizers."""


@dataclass(frozen=True)
class Sizes:
    """How much of the packs.

    Attributes:
        seq_lens: block lengths L.
        num_blocks: of each pack at each length.
        token_budget: instead, tokens of each pack at each length: so many // L blocks (spec/metrics.md 6).
        form: see `BlockForm`.
    """

    seq_lens: tuple[int, ...] = (1024, 2048)
    num_blocks: int = 512
    token_budget: int | None = None
    form: BlockForm = "L"

    def __post_init__(self) -> None:
        if not self.seq_lens or min(self.seq_lens) < 2 or len(set(self.seq_lens)) < len(self.seq_lens):
            raise InputError("--seq-lens", "", ",".join(map(str, self.seq_lens)) or "none", "lengths of at least 2, each once")
        if self.num_blocks < 1 or min(map(self.blocks_at, self.seq_lens)) < 1:
            found = f"{self.num_blocks} blocks, a budget of {self.token_budget} tokens"
            raise InputError("--num-blocks, --token-budget", "", found, f"at least one block of {max(self.seq_lens)}")
        if self.form not in ("L", "L+1"):
            raise InputError("--block-form", "", repr(self.form), "L or L+1")

    def blocks_at(self, seq_len: int) -> int:
        """Blocks of each pack at this length."""
        return self.num_blocks if self.token_budget is None else self.token_budget // seq_len

    def length_of(self, seq_len: int) -> int:
        """Ids of a block."""
        return seq_len + (self.form == "L+1")


@dataclass(frozen=True)
class PackSet:
    """What an evaluation is given.

    Attributes:
        cells: blocks by pack, UNION among them, and block length L.
        files: names of the files.
        form: see `BlockForm`.
        tokenizer_sha256: over the vocabulary, as JSON of [token, id] by id.
        vocabulary: tokens in it.
        data_seed: of the order of rows; None for the files' own.
        sample: a text of each file and the ids it becomes, by which a server's tokenizer is compared.
    """

    cells: Mapping[str, Mapping[int, Blocks]]
    files: tuple[str, ...]
    form: BlockForm
    tokenizer_sha256: str
    vocabulary: int
    sample: tuple[str, list[int]]
    data_seed: int | None = None


def load(
    files: Sequence[Path], tokenizer: str, sizes: Sizes, with_union: bool = True, column: str = "text", union_name: str = UNION,
    tell: Callable[[str], None] = lambda text: None, data_seed: int | None = None,
) -> PackSet:  # fmt: skip
    """Cut packs into blocks; reading begins anew for every pack and length.

    Args:
        files: Parquet files, in the order in which UNION takes their rows.
        tokenizer: a folder, or a name that Transformers knows.
        sizes: how much of them.
        with_union: also UNION, one row of each file in turn.
        column: that holds the conversations.
        union_name: that UNION goes by.
        tell: told what is being read.
        data_seed: puts each file's rows into another order first; None leaves it.

    Raises:
        PackError: a pack cannot be read, is too small, or has no completion token.
        InputError: no packs, two of one name, or one named as UNION; no fast tokenizer.
    """
    names = [file.stem for file in files]
    for name in names:
        if names.count(name) > 1 or name == union_name:
            raise InputError("--packs", "", f"a second pack named {name}", f"a name of its own for each file, none {union_name}")
    if not names:
        raise InputError("--packs", "", "none", "at least one Parquet file of conversations")
    loaded = load_tokenizer(tokenizer)
    packs = {file.stem: [file] for file in files} | ({union_name: list(files)} if with_union else {})
    cells: dict[str, dict[int, Blocks]] = {}
    for name, parts in packs.items():
        for seq_len in sizes.seq_lens:
            number, length = sizes.blocks_at(seq_len), sizes.length_of(seq_len)
            tell(f"{name}: {number} blocks of {length}")
            source = name if name == union_name else str(parts[0])
            blocks = pack_rows(union([_rows(part, column, data_seed) for part in parts]), loaded, length, number, source)
            if not blocks.num_kept:
                found = f"no completion token in {number} blocks of {length} ({blocks.rows_seen} rows)"
                raise PackError(source, column, found, "conversations in Harmony's form, with messages of the assistant")
            cells.setdefault(name, {})[seq_len] = blocks
    text = "".join(next(iter(read_rows(file, column)))[:_SAMPLE_CHARACTERS] for file in files)
    ids = loaded(text, add_special_tokens=False, verbose=False)["input_ids"]
    vocabulary = json.dumps(sorted(loaded.get_vocab().items(), key=lambda one: (one[1], one[0])), ensure_ascii=False)
    digest = "sha256:" + hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()
    return PackSet(cells, tuple(file.name for file in files), sizes.form, digest, len(loaded), (text, ids), data_seed)


def _rows(file: Path, column: str, data_seed: int | None) -> Iterator[str]:
    rows = read_rows(file, column)
    return rows if data_seed is None else shuffled(rows, data_seed)
