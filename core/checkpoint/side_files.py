"""The files of a checkpoint that are not its weights, and which of them a rewritten one takes along.

Everything is copied but weights in any form, whatever the folder: `original/` and `metal/` of the published gpt-oss,
`pytorch_model.bin`, `consolidated.safetensors` or a GGUF file beside the shards would carry the unpruned model along.
A sub-folder that holds weights is left out as a whole, since what is beside them describes them. Hidden folders
(`.git`, `.cache`) are left out too. What is left out is listed in the manifest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from softprune.checkpoint.headers import INDEX, TensorIndex
from softprune.errors import CheckpointError

CARD, CONFIG, MANIFEST, MAPPING, RECIPE = "README.md", "config.json", "manifest.json", "expert_mapping.json", "recipe.yaml"
WRITTEN = frozenset({CARD, CONFIG, INDEX, MANIFEST, MAPPING, RECIPE})
"""Names that a rewrite writes itself; the source's own are not copied."""

WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz", ".npy", ".tflite",
    ".mlmodel", ".pkl", ".index.json",
)  # fmt: skip
"""How names of files end that hold weights or list them."""


@dataclass(frozen=True)
class SideFiles:
    """Which files go along.

    Attributes:
        copied: (name relative to the checkpoint, with slashes; size in bytes), sorted.
        left_out: names of files, and of folders with a slash at the end, sorted; shards are in neither.
    """

    copied: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the copied files."""
        return sum(size for _, size in self.copied)


def side_files(source: Path, index: TensorIndex) -> SideFiles:
    """Divide a checkpoint's other files.

    Raises:
        CheckpointError: a file cannot be read.
    """
    shards = {shard.name for shard in index.shards}
    copied: list[tuple[str, int]] = []
    left_out: list[str] = []
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            inside = [] if entry.is_symlink() or entry.name.startswith(".") else _files(entry)
            if not inside or any(is_weights(file.name) for file in inside):
                left_out.append(entry.name + "/")
            else:
                copied += [(file.relative_to(source).as_posix(), _size(file)) for file in inside]
        elif entry.name in WRITTEN or entry.name in shards:
            continue
        elif is_weights(entry.name):
            left_out.append(entry.name)
        else:
            copied.append((entry.name, _size(entry)))
    return SideFiles(tuple(sorted(copied)), tuple(sorted(left_out)))


def _files(folder: Path) -> list[Path]:
    return sorted(Path(place) / name for place, _, names in os.walk(folder) for name in names)


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, in any form, or lists them."""
    return name.lower().endswith(WEIGHTS)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise CheckpointError(str(file), "", error.strerror or str(error), "a file that can be read") from None
