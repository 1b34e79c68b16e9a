"""Perplexity of a 5-gram model with Kneser-Ney smoothing on the held-out packs, trained on the same tokens as the small model.

    .venv/bin/python -m softprune.bench.tiny.baseline

The document keeps the sums of each block, so that a model measured on fewer blocks is compared on just these.
"""

from __future__ import annotations

import datetime
import json
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from softprune.bench.tiny import CONTEXT, PACKS, baseline_kenlm
from softprune.bench.tiny.baseline_ngram import ORDER, Ngram, estimate, score_blocks, split_conversations
from softprune.bench.tiny.measure_packs import block_hashes, heldout_blocks, load_tokenizer
from softprune.errors import InputError, SoftpruneError
from softprune.evaluate.packing import Blocks
from softprune.evaluate.reference import perplexity
from softprune.files import write_whole

FORMAT, VERSION = "softprune.tiny-ngram", 1
OPENING = "<|start|>system<|message|>"
"""What every conversation begins with."""


def training_conversations(path: Path, tokenizer: Any) -> list[np.ndarray[Any, Any]]:
    """All conversations of the tokenised training data, pack after pack, without their EOS ids.

    Raises:
        InputError: the file cannot be read, lacks a pack, or holds something else.
    """
    opening = tokenizer.encode(OPENING, add_special_tokens=False)
    conversations = []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            streams = dict(arrays)
    except (OSError, ValueError) as error:
        raise InputError(str(path), "", str(error), "tokens written by the packs' builder (make tiny-data)") from None
    for pack in PACKS:
        if pack not in streams:
            raise InputError(str(path), pack, f"arrays {', '.join(streams)}", "one array a pack")
        parts = split_conversations(streams[pack], tokenizer.eos_token_id, opening)
        if parts[0][: len(opening)].tolist() != opening:
            raise InputError(str(path), pack, f"first ids {parts[0][:8].tolist()}", f"{opening}, which is {OPENING}")
        conversations += parts
    return conversations


def evaluate(ngram: Ngram, blocks: Blocks) -> dict[str, Any]:
    """Figures of one pack, JSON-ready."""
    log_p, unknown = score_blocks(ngram, blocks)
    sums = [-row[keep].astype(np.float64).sum() for row, keep in zip(log_p, blocks.keep, strict=True)]
    hashes = block_hashes(blocks)
    return {
        "ppl": perplexity(log_p, blocks.keep),
        "num_blocks": len(blocks.ids),
        "kept_tokens": blocks.num_kept,
        "unknown_ids": unknown,
        "rows_seen": blocks.rows_seen,
        "rows_sha256": blocks.rows_sha256,
        "blocks": [[digest, int(keep.sum()), round(float(nll), 4)] for digest, keep, nll in zip(hashes, blocks.keep, sums, strict=True)],
    }


def perplexity_on(document: dict[str, Any], pack: str, blocks: Blocks, source: str) -> float:
    """The n-gram model's perplexity on the very blocks given, from a document of this program.

    Raises:
        InputError: the document was made from other blocks.
    """
    known = {digest: (kept, nll) for digest, kept, nll in document["packs"][pack]["blocks"]}
    hashes = block_hashes(blocks)
    missing = [i for i, digest in enumerate(hashes) if digest not in known]
    if missing:
        raise InputError(source, f"packs.{pack}", f"{len(missing)} unknown blocks of {len(hashes)}", "the same packs and tokenizer")
    kept, nll = (sum(column) for column in zip(*(known[digest] for digest in hashes), strict=True))
    return math.exp(nll / kept)


def main(
    packs: Annotated[Path, typer.Option(help="Folder of the held-out packs.")] = Path("bench/tiny/packs"),
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")] = Path("bench/tiny/tokenizer"),
    tokens: Annotated[Path, typer.Option(help="Tokenised training data.")] = Path(".cache/tiny/train/tokens.npz"),
    cache: Annotated[Path, typer.Option(help="Where KenLM is built, and its model lies for a while.")] = Path(".cache/tiny"),
    out: Annotated[Path, typer.Option(help="The document.")] = Path("bench/results/tiny_ngram.json"),
    num_blocks: Annotated[int, typer.Option(help="Blocks of each pack; 0 takes all.")] = 0,
) -> None:
    """Estimate the model and score every pack."""
    console = Console(stderr=True)
    try:
        with console.status("building KenLM"):
            kenlm = baseline_kenlm.build(cache)
        tok = load_tokenizer(tokenizer)
        with console.status("packing"):
            blocks = heldout_blocks(packs, tok, num_blocks or None)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            with console.status("estimating"):
                ngram = estimate(kenlm, training_conversations(tokens, tok), Path(folder))
            figures = {}
            for name, pack in blocks.items():
                with console.status(f"scoring {name}"):
                    figures[name] = evaluate(ngram, pack)
    except SoftpruneError as error:
        console.print(f"[red]{error}[/]")
        raise typer.Exit(2) from None
    document = {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": f"{ORDER}-gram, interpolated modified Kneser-Ney (KenLM {baseline_kenlm.VERSION}), nothing pruned",
        "library": {"name": "KenLM", "version": baseline_kenlm.VERSION, "sha256": baseline_kenlm.SHA256},
        "seq_len": CONTEXT,
        "training": ngram.facts,
        "packs": figures,
    }
    write_whole(out, json.dumps(document) + "\n")
    table = Table("pack", "perplexity", "completion tokens", "blocks", "unknown ids", title=str(document["model"]))
    for name, entry in figures.items():
        table.add_row(name, f"{entry['ppl']:.3f}", f"{entry['kept_tokens']:,}", str(entry["num_blocks"]), str(entry["unknown_ids"]))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
