"""Files for reports, as softprune itself writes them: evaluations by its accumulator, gates by its comparison, a sweep of both."""

from __future__ import annotations

import datetime
import json
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from softprune.evaluate import evaluation, gates, pair
from softprune.evaluate.metrics import Accumulator, MetricSettings
from softprune.files import digest_of
from softprune.mask import ExpertMask, MaskModel

ROWS = (("UNION", 1024), ("UNION", 2048), ("code", 1024), ("chat_if", 1024))
MODEL = MaskModel(architecture="GptOssForCausalLM", num_layers=3, num_experts=12, top_k=4, fingerprint="sha256:" + "a" * 64)
HARM = {28: 0.004, 24: 0.02, 20: 0.08, 16: 0.3}
"""By experts kept, how much worse the tokens of a cell are."""


def document(
    label: str,
    harm: float = 0.0,
    seed: int = 0,
    rows: tuple[tuple[str, int], ...] = ROWS,
    blocks: int = 16,
    tokens: int = 1000,
    data: str = "a",
    mask: str | None = None,
    kept: int | None = None,
    scale: Literal["linear", "log"] = "linear",
) -> dict[str, Any]:
    """An evaluation of tokens that one law made, each a little less likely with more `harm`; `seed` only changes the harm done."""
    settings = MetricSettings(sample_points=50, prob_scale=scale)
    packs: dict[str, dict[str, Any]] = {}
    for pack, length in rows:
        tokens_rng = np.random.default_rng([zlib.crc32(pack.encode()), length])
        harm_rng, total = np.random.default_rng([seed, length]), Accumulator(settings)
        for _ in range(blocks):
            nll = tokens_rng.gamma(0.25, 1.0, tokens)
            noise = tokens_rng.beta(2, 3, tokens)
            worse = nll + harm * harm_rng.gamma(0.5, 2.0, tokens)
            entropy = np.clip((1 - np.exp(-worse)) * noise * 1.6, 0, 1)
            total.add_block((-worse).astype(np.float32), entropy.astype(np.float32))
        cell = {
            "rows_seen": 40, "rows_sha256": digest_of(f"{data} {pack} {length}".encode()), "pack_wall_s": 3.5, "num_blocks": blocks,
            "blocks_sha256": digest_of(f"{data} {pack} {length} blocks".encode()), "model": total.cell(),
        }  # fmt: skip
        packs.setdefault(pack, {})[str(length)] = cell
    own = {
        "format": "softprune.evaluation", "version": 1, "softprune_version": "0.1.0", "date": "2026-11-20T12:00:00+00:00",
        "fingerprint": MODEL.fingerprint, "mask": mask, "num_kept": None if kept is None else [kept] * 3, "tokenizer_sha256": "b" * 64,
        "block_form": "L", "vocabulary_size": 1200,
    }  # fmt: skip
    files = sorted({f"{pack}.parquet" for pack, _ in rows if pack != "UNION"})
    meta = {
        "dataset_repo": None, "pack_files": files, "model_id": label, "model_path": "tiny",
        "gpu_type": None, "gpu_name": None, "gpu_sm": None, "torch": "2.13.0", "vllm_version": "0.32.0", "transformers_version": "5.0",
        "engine": "vllm", "top_k": 4, "entropy_topk": 20, "cc_quantile": 0.15, "num_blocks": blocks, "batch_size": 8,
        "hist_xbins": 160, "hist_ybins": 120, "prob_scale": scale, "logp_min": -12.0, "logp_max": 0.0, "sample_points": 50,
        "seq_lens": sorted({length for _, length in rows}), "axes": {"x": "p", "y": "H_topK/ln(K)"}, "x_min": 0.0, "x_max": 1.0,
        "run_id": "20261120_120000", "softprune": own,
    }  # fmt: skip
    return {"meta": meta, "packs": [{"pack": pack, "seq": cells} for pack, cells in packs.items()]}


def written(path: Path, *arguments: Any, **options: Any) -> Path:
    """An evaluation's file."""
    evaluation.write(document(*arguments, **options), path)
    return path


def gate_file(base: Path, candidate: Path, path: Path) -> dict[str, Any]:
    """The result of a gate, written and given back."""
    result = pair.compare(evaluation.read(base), evaluation.read(candidate), gates.read("near-lossless-v1")).document()
    path.write_text(json.dumps(result))
    return result


def mask(kept: int = 8) -> ExpertMask:
    """Keeps the first so many experts."""
    provenance = {"method": "reap", "note": "<b>bold</b>"}
    return ExpertMask(model=MODEL, keep=[list(range(kept)), None, list(range(12 - kept, 12))], provenance=provenance)


def sweep(
    folder: Path,
    keeps: tuple[int, ...] = (28, 24, 20, 16),
    methods: tuple[str, ...] = ("reap", "eaft_reap", "random"),
    seeds: int = 1,
    **size: Any,
) -> Path:
    """A sweep's folder: every evaluation and gate in it, `random` once for each seed; `size` as of `document`."""
    folder.mkdir(parents=True, exist_ok=True)
    base = written(folder / "base.json", "tiny", **size)
    cells = []
    for factor, method in enumerate(methods, 1):
        for keep in keeps:
            for seed in range(seeds) if method == "random" else [None]:
                name = f"{method}-{keep}" + ("" if seed is None else f"-{seed}")
                digest = digest_of(name.encode())
                harm = HARM[keep] * factor * (1 + 0.2 * (seed or 0))
                candidate = written(folder / f"{name}.json", name, harm, seed or 0, mask=digest, kept=keep, **size)
                result = gate_file(base, candidate, folder / f"{name}.gate.json")
                ppl = {f"{row['pack']}@{row['seq_len']}": row["candidate"]["ppl"] for row in result["rows"]}
                ratio = 1 + (32 - keep) * 0.012 + 0.002 * factor
                label = f"{method} keep {keep}" + ("" if seed is None else f" seed {seed}")
                cells.append({
                    "label": label, "method": method, "keep": keep, "seed": seed,
                    "mask": f"masks/{name}.json", "mask_hash": digest, "evaluation": candidate.name, "gate": f"{name}.gate.json",
                    "verdict": result["verdict"], "ppl": ppl, "rel_ppl": result["rows"][0]["delta"]["rel_ppl"]["value"],
                    "decode": {"batch": 8, "tok_s": 410.0 * ratio, "over_base": ratio, "low": ratio - 0.015, "high": ratio + 0.02},
                    "pareto": method == "reap",
                })  # fmt: skip
    document = {
        "format": "softprune.sweep", "version": 1, "date": datetime.date(2026, 11, 20).isoformat(), "softprune_version": "0.1.0",
        "engine": "vLLM 0.32.0", "model": "tiny", "fingerprint": MODEL.fingerprint, "base": "base.json", "cells": cells, "error": None,
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(document))
    return folder
