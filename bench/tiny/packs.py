"""Builds the packs, the tokenizer and the data card: `python -m softprune.bench.tiny.packs`.

The same sources, Python 3.11 and the versions that data.json names give the same bytes. The training part is written
to .cache/tiny/train. The rest goes to .cache/tiny/rebuilt and must equal what is committed in bench/tiny; with
`--update` it goes to bench/tiny itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from softprune.bench.tiny import PACKS
from softprune.bench.tiny.data import kind_chat, kind_code, kind_reasoning, kind_tools, tokenizer
from softprune.bench.tiny.data.card import card
from softprune.bench.tiny.data.dedup import NearDuplicates
from softprune.bench.tiny.data.documents import Document, read_documents
from softprune.bench.tiny.data.notices import notices
from softprune.bench.tiny.data.pack_files import MAX_ROW_TOKENS, Row, write_pack
from softprune.bench.tiny.data.part import Part, num_completion_tokens
from softprune.bench.tiny.data.render import Conversation
from softprune.bench.tiny.data.source_list import SOURCES
from softprune.bench.tiny.data.sources import fetch_all
from softprune.checkpoint.harmony import EOS_TOKENS
from softprune.errors import InputError
from softprune.files import write_whole

FOLDER = Path("bench/tiny")
CACHE = Path(".cache/tiny")
HELDOUT_ROWS = 800
TRAIN_TOKENS = 6_100_000
_SAMPLE_CHARACTERS = 4_000_000
_BATCH = 1000

Maker = Callable[[bool], Iterator[Conversation]]


def makers(prose: Sequence[Document], code: Sequence[Document]) -> dict[str, Maker]:
    """Pack -> its conversations; the held-out part must be drawn first, so that near-duplicates leave the training part."""
    chat_known, code_known = NearDuplicates(), NearDuplicates()
    return {
        "reasoning_style": kind_reasoning.conversations,
        "tool_agentic": kind_tools.conversations,
        "chat_if": lambda heldout: kind_chat.conversations(prose, heldout, chat_known),
        "code": lambda heldout: kind_code.conversations(code, heldout, code_known),
    }


def take(
    conversations: Iterator[Conversation], model: Tokenizer, rows: int | None, tokens: int | None, advance: Callable[[int], None]
) -> Part:
    """Rows of fewer than MAX_ROW_TOKENS tokens until there are `rows` of them, or `tokens` ids, or no more.

    Args:
        advance: told how many ids have been added.
    """
    eos = model.token_to_id(EOS_TOKENS[0])
    kept: list[Row] = []
    ids: list[npt.NDArray[np.uint16]] = []
    total = completion = 0
    while batch := list(islice(conversations, _BATCH)):
        before = total
        for conversation, encoding in zip(batch, model.encode_batch([one.text for one in batch], add_special_tokens=False), strict=True):
            if len(kept) == rows or (tokens is not None and total >= tokens):
                break
            if len(encoding.ids) < MAX_ROW_TOKENS:
                kept.append(Row(conversation.text, conversation.source, conversation.document))
                ids.append(np.array([*encoding.ids, eos], dtype=np.uint16))
                total += len(ids[-1])
                completion += num_completion_tokens(conversation.text, encoding)
        else:
            advance(total - before)
            continue
        break
    return Part(kept, np.concatenate(ids), completion)


def build(folder: Path, cache: Path, heldout_rows: int, train_tokens: int, console: Console) -> dict[str, Any]:
    """Build everything; answers what it writes to `folder`/data.json.

    Args:
        folder: gets packs/, tokenizer/, DATA.md and data.json.
        cache: gets sources/ and train/.
        train_tokens: of each pack, as many as there are at most.
    """
    sources = cache / "sources"
    fetch_all(SOURCES, sources, console)
    prose, code = (
        [one for source in SOURCES if source.kind == kind for one in read_documents(source, sources / source.file)]
        for kind in ("prose", "code")
    )
    console.print(f"{len(prose):,} prose documents, {len(code):,} Python files")
    heldout_drawn: dict[str, list[Conversation]] = {}
    sample: dict[str, list[Conversation]] = {}
    streams: dict[str, Iterator[Conversation]] = {}
    parts: dict[str, dict[str, Part]] = {}
    with Progress(console=console, transient=True) as progress:
        for pack, maker in makers(prose, code).items():
            bar = progress.add_task(f"{pack}: held-out part and tokenizer's sample", total=_SAMPLE_CHARACTERS)
            # More than enough, for those that turn out too long.
            heldout_drawn[pack] = list(islice(maker(True), heldout_rows * 5 // 4))
            streams[pack], sample[pack], size = maker(False), [], 0
            while size < _SAMPLE_CHARACTERS and (conversation := next(streams[pack], None)) is not None:
                sample[pack].append(conversation)
                size += len(conversation.text)
                progress.update(bar, completed=size)
            console.print(f"{pack}: {len(sample[pack]):,} conversations for the tokenizer")
        model = tokenizer.train(conversation.text for pack in PACKS for conversation in sample[pack])
        tokenizer.save(model, folder / "tokenizer")
        bar = progress.add_task("tokens", total=train_tokens * len(PACKS))
        for pack in PACKS:
            parts[pack] = {
                "train": take(chain(sample[pack], streams[pack]), model, None, train_tokens, lambda count: progress.advance(bar, count)),
                "heldout": take(iter(heldout_drawn[pack]), model, heldout_rows, None, lambda count: None),
            }
            console.print(f"{pack}: {len(parts[pack]['train'].rows):,} training rows, {len(parts[pack]['train'].tokens):,} tokens")
            write_pack(cache / "train" / f"{pack}.parquet", parts[pack]["train"].rows)
            write_pack(folder / "packs" / f"{pack}.parquet", parts[pack]["heldout"].rows)
    write_tokens(cache / "train" / "tokens.npz", {pack: parts[pack]["train"] for pack in PACKS})
    data = described(parts, folder / "tokenizer" / "tokenizer.json")
    write_whole(folder / "data.json", json.dumps(data, indent=1) + "\n")
    write_whole(folder / "DATA.md", card(data))
    write_whole(folder / "NOTICES.txt", notices(SOURCES, sources))
    return data


def described(parts: Mapping[str, Mapping[str, Part]], tokenizer_file: Path) -> dict[str, Any]:
    """What data.json holds."""
    by_source: dict[str, dict[str, int]] = {}
    for pack in parts.values():
        for name, part in pack.items():
            for source, count in Counter(row.source for row in part.rows).items():
                by_source.setdefault(source, {"train": 0, "heldout": 0})[name] += count
    return {
        "packs": {pack: {name: part.measures() for name, part in both.items()} for pack, both in parts.items()},
        "conversations_by_source": dict(sorted(by_source.items())),
        "tokenizer_sha256": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tokenizers", "pyarrow", "datasketch", "numpy")},
        },
    }


def write_tokens(path: Path, parts: Mapping[str, Part]) -> None:
    """One uint16 array a pack as `path`, and the same file compressed as `path`.xz for hosts with the standard library alone."""
    # Any: numpy's stubs take every keyword for one of savez' own options.
    arrays: dict[str, Any] = {pack: part.tokens for pack, part in parts.items()}
    packed = path.with_name(f"{path.name}.xz")
    temporary, temporary_packed = (one.with_name(f".{one.name}.npz") for one in (path, packed))
    np.savez(temporary, **arrays)
    with lzma.open(temporary_packed, "wb", preset=4) as file:
        file.write(temporary.read_bytes())
    temporary.replace(path)
    temporary_packed.replace(packed)


def same(committed: Path, rebuilt: Mapping[str, Any]) -> None:
    """Compare a rebuild with the committed data.json.

    Raises:
        InputError: a size or hash differs.
    """
    expected = json.loads(committed.read_text(encoding="utf-8"))
    for pack, parts in expected["packs"].items():
        for name, part in parts.items():
            for field, value in part.items():
                if (found := rebuilt["packs"][pack][name][field]) != value:
                    raise InputError(
                        "rebuilt packs", f"{pack}.{name}.{field}", str(found), f"{value} ({committed}, built with {expected['versions']})"
                    )
    if rebuilt["tokenizer_sha256"] != expected["tokenizer_sha256"]:
        raise InputError("rebuilt tokenizer", "sha256", rebuilt["tokenizer_sha256"], f"{expected['tokenizer_sha256']} ({committed})")


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write to bench/tiny instead of comparing with it")
    parser.add_argument("--train-tokens", type=int, default=TRAIN_TOKENS, help="of each pack")
    parser.add_argument("--heldout-rows", type=int, default=HELDOUT_ROWS, help="of each pack")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    data = build(FOLDER if arguments.update else CACHE / "rebuilt", CACHE, arguments.heldout_rows, arguments.train_tokens, console)
    if not arguments.update:
        same(FOLDER / "data.json", data)
    for pack, parts in data["packs"].items():
        console.print(pack, {name: (part["conversations"], part["tokens"], part["completion_tokens"]) for name, part in parts.items()})


if __name__ == "__main__":
    main()
