"""Turn an MXFP4 gpt-oss checkpoint into a BF16 one, for engines and machines without MXFP4 kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from softprune.checkpoint.families import family_of, read_config
from softprune.checkpoint.headers import TensorIndex
from softprune.checkpoint.mxfp4 import BLOCK, dequantize
from softprune.checkpoint.writer import MAX_SHARD_BYTES, PlannedTensor, Progress, write_checkpoint
from softprune.errors import CheckpointError

_BLOCKS, _SCALES = "_blocks", "_scales"


def dequantize_checkpoint(
    model_dir: str | Path, out_dir: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES, progress: Progress | None = None
) -> None:
    """Write a BF16 copy of an MXFP4 checkpoint: same values, same fingerprint, about four times the size.

    Memory stays at a few experts, since each is decoded by itself.

    Raises:
        CheckpointError: not an MXFP4 checkpoint of a known family, a tensor is missing, or `out_dir` exists.
    """
    source = Path(model_dir)
    config = read_config(source)
    family = family_of(config, str(source / "config.json"))
    if family.storage != "mxfp4":
        raise CheckpointError(str(source / "config.json"), "quantization_config", family.storage, "an MXFP4 checkpoint")
    index = TensorIndex(source)
    planned = list(_plan(index))
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    copied = {
        path.name: path for path in sorted(source.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", "model.safetensors.index.json")
    }  # fmt: skip
    write_checkpoint(out_dir, planned, {**copied, "config.json": config}, max_shard_bytes, progress)


def _plan(index: TensorIndex) -> Iterator[PlannedTensor]:
    for name, info in index.tensors.items():
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in index:
            continue
        if not name.endswith(_BLOCKS):
            yield PlannedTensor(name, info.dtype, info.shape, lambda name=name: iter([index.load(name)]))  # type: ignore[misc]
            continue
        stem = name.removesuffix(_BLOCKS)
        if stem + _SCALES not in index:
            raise CheckpointError(str(index.model_dir), stem + _SCALES, "no such tensor", f"the scales of {name}")
        experts, rows, groups, _ = info.shape
        yield PlannedTensor(stem, "BF16", (experts, groups * BLOCK, rows), lambda stem=stem: _decode(index, stem))  # type: ignore[misc]


def _decode(index: TensorIndex, stem: str) -> Iterator[torch.Tensor]:
    blocks, scales = index.load(stem + _BLOCKS), index.load(stem + _SCALES)
    for expert in range(blocks.shape[0]):
        yield dequantize(blocks[expert : expert + 1], scales[expert : expert + 1])
