"""Writing a safetensors checkpoint as a stream: headers first, then payloads, one chunk in memory.

The folder appears under its name only when it is whole: it is written beside itself and renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from softprune.checkpoint.headers import INDEX, payload_bytes
from softprune.checkpoint.staging import renamed_after

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
        CheckpointError: the folder exists already, or another process writes it.
        ValueError: a tensor's chunks do not add up to its planned size.
    """
    with renamed_after(Path(out_dir)) as folder:
        shards = plan_shards(tensors, max_shard_bytes)
        names = shard_names(len(shards))
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, progress)
        if len(shards) > 1:
            files = {**files, INDEX: index_of(names, shards)}
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_text(content if isinstance(content, str) else json_text(content), encoding="utf-8")


class Storable(Protocol):
    """What a shard's header says of a tensor; sizes in bytes."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_bytes(self) -> int: ...


Stored = TypeVar("Stored", bound=Storable)


def plan_shards(tensors: Iterable[Stored], limit: int) -> list[list[Stored]]:
    """Tensors in order, a new shard before one that would exceed `limit` bytes of payload."""
    shards: list[list[Stored]] = [[]]
    room = limit
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    return shards


def shard_names(number: int) -> list[str]:
    """File names of so many shards, as Transformers names them."""
    if number == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]


def index_of(names: Sequence[str], shards: Sequence[Sequence[Storable]]) -> dict[str, Any]:
    """model.safetensors.index.json: the payload's true size, and the shard of each tensor."""
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def json_text(content: Any) -> str:
    """JSON as the Hub's files have it."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def header_of(tensors: Sequence[Storable]) -> bytes:
    """A shard's first bytes: the header's length and the header, whose payloads follow one another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.num_bytes],
        }  # fmt: skip
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(path: Path, tensors: Sequence[PlannedTensor], progress: Progress | None) -> None:
    with open(path, "wb") as file:
        file.write(header_of(tensors))
        for tensor in tensors:
            written = 0
            for chunk in tensor.chunks():
                written += file.write(chunk.contiguous().view(torch.uint8).numpy().data)
            if written != tensor.num_bytes:
                raise ValueError(f"{tensor.name}: {written} bytes came, {tensor.num_bytes} were planned")
            if progress:
                progress(tensor.name, written)
