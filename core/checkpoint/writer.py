"""Writing a safetensors checkpoint as a stream: headers first, then payloads, one chunk in memory.

The folder appears under its name only when it is whole: it is written beside itself and renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softprune.checkpoint.headers import payload_bytes
from softprune.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000
"""Largest payload of one shard (5 GB, decimal, as the Hub's)."""

Progress = Callable[[str, int], None]
"""Called as (tensor name, bytes written) after each tensor."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: name, dtype name and shape are known, values come in chunks, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Size of the payload in bytes."""
        return payload_bytes(self.dtype, self.shape)


def write_checkpoint(
    out_dir: str | Path,
    tensors: Sequence[PlannedTensor],
    files: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write tensors and side files as a checkpoint folder.

    Args:
        out_dir: the folder to make; it must not exist.
        tensors: in the order in which they are to be stored.
        files: name -> text, or an object to be written as JSON, or a path to copy.
        max_shard_bytes: a shard is closed before a tensor that would exceed this.
        progress: called after each tensor.

    Raises:
        CheckpointError: the folder exists already.
        ValueError: a tensor's chunks do not add up to its planned size.
    """
    out = Path(out_dir)
    if out.exists():
        raise CheckpointError(str(out), "", "a folder that exists already", "a new name")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        shards = _plan_shards(tensors, max_shard_bytes)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(temporary / name, shard, progress)
            weight_map.update({tensor.name: name for tensor in shard})
        if len(shards) > 1:
            total = sum(tensor.num_bytes for tensor in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            files = {**files, "model.safetensors.index.json": index}
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, temporary / name)
            else:
                text = content if isinstance(content, str) else json.dumps(content, indent=2, sort_keys=True) + "\n"
                (temporary / name).write_text(text, encoding="utf-8")
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _plan_shards(tensors: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    room = limit
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    return shards


def _write_shard(path: Path, tensors: Sequence[PlannedTensor], progress: Progress | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.num_bytes],
        }  # fmt: skip
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            written = 0
            for chunk in tensor.chunks():
                written += file.write(chunk.contiguous().view(torch.uint8).numpy().data)
            if written != tensor.num_bytes:
                raise ValueError(f"{tensor.name}: {written} bytes came, {tensor.num_bytes} were planned")
            if progress:
                progress(tensor.name, written)
