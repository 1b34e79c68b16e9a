"""Reading safetensors checkpoints tensor by tensor, without loading a shard.

`safetensors` itself checks headers and hands out single tensors; this module adds where their bytes lie, the
index over shards, and errors that name the shard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from softprune.errors import CheckpointError

# Bytes of one element, by the dtype names of the safetensors format.
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

INDEX = "model.safetensors.index.json"


def payload_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size in bytes of a tensor's payload, from its dtype name and shape."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor: its shard, dtype name ("BF16", "U8", ...), shape, and where its payload begins in the file."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Size of the payload in bytes."""
        return payload_bytes(self.dtype, self.shape)


class TensorIndex:
    """All tensors of a checkpoint folder, by name; shard by shard, in the order in which they are stored.

    Attributes:
        shards: the safetensors files, sorted.
        weight_map: tensor to shard as the index says; {} without an index.

    Raises:
        CheckpointError: no safetensors files, an index that names a missing shard or tensor or a tensor twice, a
            tensor in two shards, or a shard that is cut short or whose header cannot be read.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        self.weight_map: dict[str, str] = {}
        self.shards = self._find_shards()
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for info in _read_header(shard):
                if info.name in self.tensors:
                    other = self.tensors[info.name].shard.name
                    raise CheckpointError(str(shard), info.name, f"a tensor that is also in {other}", "each tensor in one shard")
                self.tensors[info.name] = info
        for name, shard_name in self.weight_map.items():
            listed = self.tensors.get(name)
            if listed is None or listed.shard.name != shard_name:
                raise CheckpointError(str(self.model_dir / shard_name), name, "no such tensor", "the tensor that the index lists there")

    def _find_shards(self) -> list[Path]:
        index = self.model_dir / INDEX
        if index.exists():
            try:
                document = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
                self.weight_map = {str(name): str(shard) for name, shard in document["weight_map"].items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(str(index), "weight_map", f"unreadable ({error})", "a map from tensor to shard") from None
            outside = [shard for shard in self.weight_map.values() if Path(shard).name != shard]
            if outside:
                raise CheckpointError(str(index), "weight_map", repr(outside[0]), "names of files in the same folder")
            return [self.model_dir / name for name in sorted(set(self.weight_map.values()))]
        shards = sorted(self.model_dir.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(str(self.model_dir), "*.safetensors", "no such file", "a safetensors checkpoint")
        return shards

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(str(self.model_dir), name, "no such tensor", "a tensor of this name")
        with safe_open(info.shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.num_bytes for info in self.tensors.values())


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is there twice")
        found[key] = value
    return found


def _read_header(shard: Path) -> Iterator[TensorInfo]:
    """Entries by position; safetensors has checked by then that they fill the file, without gaps, and fit their shapes."""
    try:
        with safe_open(shard, framework="pt"):
            pass
        with open(shard, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_each_once)
    except FileNotFoundError:
        raise CheckpointError(str(shard), "", "no such file", "a shard that the index names") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(str(shard), "header", f"unreadable ({error})", "a whole safetensors file") from None
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        if entry["dtype"] not in DTYPE_BYTES:
            raise CheckpointError(str(shard), name, f"dtype {entry['dtype']}", f"one of {', '.join(DTYPE_BYTES)}")
        yield TensorInfo(name, shard, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
