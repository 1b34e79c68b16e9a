"""Checkpoints of any size that take no room: true headers, and payloads that are holes in the files."""

from __future__ import annotations

import copy
from pathlib import Path

from softprune.checkpoint import synth
from softprune.checkpoint.headers import INDEX
from softprune.checkpoint.presets import MXFP4_CONFIG, PRESETS
from softprune.checkpoint.writer import MAX_SHARD_BYTES, header_of, index_of, json_text, plan_shards, shard_names


def hollow_checkpoint(preset: str, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> Path:
    """The MXFP4 checkpoint of a preset, all zeros."""
    config = copy.deepcopy(PRESETS[preset]) | {"quantization_config": dict(MXFP4_CONFIG)}
    rows = synth._tensors(config, "mxfp4", None)
    shards = plan_shards([synth._planned(*row, seed=0) for row in rows], max_shard_bytes)
    names = shard_names(len(shards))
    out.mkdir(parents=True)
    for name, shard in zip(names, shards, strict=True):
        with open(out / name, "wb") as file:
            file.write(header_of(shard))
            file.truncate(file.tell() + sum(tensor.num_bytes for tensor in shard))
    (out / INDEX).write_text(json_text(index_of(names, shards)))
    (out / "config.json").write_text(json_text(config))
    return out
