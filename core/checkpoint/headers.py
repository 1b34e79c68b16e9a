"""Reading safetensors checkpoints tensor by tensor, without loading a shard.

`safetensors` itself maps the file and hands out single tensors; this module adds the index over
shards and errors that name the shard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from softprune.errors import CheckpointError

# Bytes of one element, by the dtype names of the safetensors format.
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def payload_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size in bytes of a tensor's payload, from its dtype name and shape."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor: its shard, dtype name ("BF16", "U8", ...) and shape."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the payload in bytes."""
        return payload_bytes(self.dtype, self.shape)


class TensorIndex:
    """All tensors of a checkpoint folder, by name.

    Raises:
        CheckpointError: no safetensors files, an index that names a missing shard or tensor, or a
            shard whose header cannot be read.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        self.tensors = {info.name: info for shard in self._shards() for info in _read_header(shard)}
        for name, shard in self._weight_map.items():
            info = self.tensors.get(name)
            if info is None or info.shard.name != shard:
                raise CheckpointError(str(self.model_dir / shard), name, "no such tensor", "the tensor that the index lists there")

    def _shards(self) -> list[Path]:
        index = self.model_dir / "model.safetensors.index.json"
        self._weight_map: dict[str, str] = {}
        if index.exists():
            try:
                self._weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(str(index), "weight_map", f"unreadable ({error})", "a map from tensor to shard") from None
            return [self.model_dir / name for name in sorted(set(self._weight_map.values()))]
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


def _read_header(shard: Path) -> Iterator[TensorInfo]:
    try:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                view = file.get_slice(name)
                yield TensorInfo(name, shard, view.get_dtype(), tuple(view.get_shape()))
    except FileNotFoundError:
        raise CheckpointError(str(shard), "", "no such file", "a shard that the index names") from None
    except SafetensorError as error:
        raise CheckpointError(str(shard), "header", f"unreadable ({error})", "a safetensors header") from None
