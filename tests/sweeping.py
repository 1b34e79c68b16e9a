"""Statistics, three rankings, and a sweep of four numbers kept over two packs, by softprune's own commands through one running server.

Statistics come from the second half of each pack, evaluations from the first. The gates are near-lossless-v1's, at the length that the
small model was trained on. The largest number kept is swept again over all there is of the first half: where a mask may pass, the gate
wants more tokens before it says that it does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprune.bench.tiny.weights import HERE as TINY
from softprune.evaluate import gates
from softprune.evaluate.packing import read_rows

PACKS, METHODS, KEEPS, SEQ_LEN = ("chat_if", "code"), ("reap", "eaft_reap", "frequency"), (28, 24, 20, 16), 1024
HALF, BLOCKS, ALL_BLOCKS, COLLECTED_BLOCKS = 400, 50, 110, 16
WIDE = {
    "name": "wide", "max_abs_delta_ppl": 9.0, "max_rel_delta_ppl": 9.0, "max_abs_delta_cc_rate": 1.0, "max_abs_delta_mean_prob": 1.0,
    "max_js2d": 0.7,
}  # fmt: skip


def prepare(work: Path) -> None:
    """Both halves of each pack as JSON Lines, and gates that are strict and wide."""
    for name in PACKS:
        rows = list(read_rows(TINY / "packs" / f"{name}.parquet"))
        for half, part in (("scored", rows[:HALF]), ("collected", rows[HALF:])):
            (work / half).mkdir(parents=True, exist_ok=True)
            (work / half / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in part))
    rules = gates.read(gates.NEAR_LOSSLESS).model_dump() | {"name": "near-lossless-v1 at 1024", "primary_seq_lens": [SEQ_LEN]}
    (work / "strict.json").write_text(json.dumps(rules))
    (work / "wide.json").write_text(json.dumps(rules | WIDE))


def files(work: Path, half: str, option: str = "--packs") -> list[object]:
    """The options that name the packs of a half."""
    return [part for name in PACKS for part in (option, work / half / f"{name}.jsonl")]


def softprune(key: str, *arguments: object, code: int = 0, env: Mapping[str, str] | None = None) -> str:
    """Run a command; what it printed. Fails unless it exits with `code`."""
    command = [sys.executable, "-c", "from softprune.cli import app; app()", *map(str, arguments)]
    environment = {**os.environ, **(env or {}), "SOFTPRUNE_KEY": key, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=2200, env=environment)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def sweep(
    url: str, key: str, work: Path, tokenizer: Path, decode: Sequence[object] = (), blocks: int = BLOCKS, keeps: Sequence[int] = KEEPS,
    out: str = "sweep",
) -> dict[str, Any]:  # fmt: skip
    """Collect, rank and sweep; what stands in sweep.json.

    Args:
        url, key: of a server of the trained model that runs with `--softprune-stats eaft`, under the mask that it is to have at the end.
        work: folder that `prepare` filled; statistics that lie there as stats.safetensors are ranked, and none are collected.
        tokenizer: folder.
        decode: options of the decode measurement.
        blocks: of each pack.
        keeps: numbers of experts kept.
        out: folder in `work`; a sweep that is whole there is not run again.
    """
    written = work / out / "sweep.json"
    document: dict[str, Any] = json.loads(written.read_text()) if written.exists() else {"cells": []}
    if len(document["cells"]) == len(METHODS) * len(keeps) and document["error"] is None:
        return document
    common = ["--url", url, "--tokenizer", tokenizer]
    if not (work / "stats.safetensors").exists():
        collect = ["--mode", "eaft", "--num-blocks", COLLECTED_BLOCKS, "-o", work / "stats.safetensors"]
        softprune(key, "stats", "collect", *common, *files(work, "collected"), *collect)
    for method in METHODS:
        softprune(key, "rank", work / "stats.safetensors", "--method", method, "-o", work / f"{method}.yaml")
    scores = [part for method in METHODS for part in ("--scores", work / f"{method}.yaml")]
    softprune(
        key, "sweep", *common, *files(work, "scored"), *scores, "--keep", ",".join(map(str, keeps)), "--seq-lens", SEQ_LEN,
        "--num-blocks", blocks, "--gates", work / "strict.json", *decode, "--out", work / out,
    )  # fmt: skip
    return dict(json.loads(written.read_text()))


def sweeps(url: str, key: str, work: Path, tokenizer: Path, decode: Sequence[object] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sweeps, as `sweep` takes them: sweep.json of the first, and `shown` of all, the second's in place of the first's."""
    first = sweep(url, key, work, tokenizer, decode)
    second = sweep(url, key, work, tokenizer, decode, ALL_BLOCKS, KEEPS[:1], "sweep_more")
    return first, shown(first) | shown(second)


def shown(document: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of each mask."""
    return {cell["label"]: {name: cell[name] for name in ("verdict", "ppl", "rel_ppl", "decode", "pareto")} for cell in document["cells"]}
