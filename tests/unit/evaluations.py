"""Evaluation files of synthetic tokens: a base, and a candidate that gives the same tokens other probabilities."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.evaluate.metrics import Accumulator, MetricSettings

Blocks = list[tuple[NDArray[np.float32], NDArray[np.float32]]]
ROWS = (("UNION", 1024), ("UNION", 2048), ("code", 1024))


def scored(shift: float = 0.0, noise: float = 0.0, num_blocks: int = 24, tokens: int = 40, seed: int = 0) -> Blocks:
    """(log p, H) of each block. The same seed gives the same tokens, to which a candidate adds a shift and noise of the logit of p.

    Blocks have a mean of their own, and from `tokens` // 2 to `tokens` tokens.
    """
    rng, own = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    found: Blocks = []
    for _ in range(num_blocks):
        count = int(rng.integers(tokens // 2, tokens + 1))
        logit = rng.normal(0.5, 2.0, count) + rng.normal(0, 0.5)
        spread = rng.normal(0, 1, count)
        logit = logit - shift + noise * own.normal(0, 1, count)
        entropy = 1 / (1 + np.exp(0.5 + 0.5 * logit - spread))
        found.append(((-np.log1p(np.exp(-logit))).astype(np.float32), entropy.astype(np.float32)))
    return found


def cell(blocks: Blocks, settings: MetricSettings | None = None, data: str = "data") -> dict[str, Any]:
    """One pack at one block length."""
    accumulator = Accumulator(settings or MetricSettings())
    for log_p, entropy in blocks:
        accumulator.add_block(log_p, entropy)
    digest = hashlib.sha256(data.encode()).hexdigest()
    return {
        "rows_seen": 7, "rows_sha256": digest, "pack_wall_s": 1.5, "num_blocks": len(blocks), "blocks_sha256": digest[::-1],
        "model": accumulator.cell(),
    }  # fmt: skip


def document(
    shift: float = 0.0, noise: float = 0.0, settings: MetricSettings | None = None, rows: tuple[tuple[str, int], ...] = ROWS, **more: Any
) -> dict[str, Any]:
    """A whole file; each of `rows` has its own tokens."""
    settings = settings or MetricSettings()
    packs: dict[str, dict[str, Any]] = {}
    for number, (pack, length) in enumerate(rows):
        packs.setdefault(pack, {})[str(length)] = cell(scored(shift, noise, seed=number, **more), settings, f"{pack}{length}")
    low, high = settings.plane.x_range
    number_of_blocks = next(iter(next(iter(packs.values())).values()))["num_blocks"]
    meta = {
        "dataset_repo": None, "pack_files": ["a.parquet"], "model_id": f"shifted by {shift:g}", "model_path": "model", "torch": "2",
        "transformers_version": "5", "engine": "vllm", "top_k": 4, "entropy_topk": settings.entropy_topk,
        "cc_quantile": settings.cc_quantile, "num_blocks": number_of_blocks, "batch_size": 1, "hist_xbins": settings.xbins,
        "hist_ybins": settings.ybins, "prob_scale": settings.prob_scale, "logp_min": settings.logp_min, "logp_max": settings.logp_max,
        "sample_points": settings.sample_points, "seq_lens": sorted({length for _, length in rows}), "axes": {"x": "p", "y": "H"},
        "x_min": low, "x_max": high, "run_id": "run",
        "softprune": {
            "format": "softprune.evaluation", "version": 1, "softprune_version": "0.1.0", "date": "2026-01-01T00:00:00Z",
            "fingerprint": "sha256:" + "a" * 64, "mask": None, "num_kept": None, "tokenizer_sha256": "sha256:" + "b" * 64,
            "block_form": "L", "vocabulary_size": 4096,
        },
    }  # fmt: skip
    return {"meta": meta, "packs": [{"pack": pack, "seq": lengths} for pack, lengths in packs.items()]}


def of_the_study(ours: dict[str, Any]) -> dict[str, Any]:
    """The same file as the study's collector writes it: without our keys, and without the number of blocks in each row."""
    found = copy.deepcopy(ours)
    del found["meta"]["softprune"]
    for pack in found["packs"]:
        for one in pack["seq"].values():
            del one["num_blocks"], one["blocks_sha256"], one["model"]["softprune"]
    return found
