"""`weights`: from the checkpoint alone, without any text.

AIMER (arXiv 2603.18492) is the absolute mean over the root mean square of all of an expert's matrices taken together,
||w||_1 / (sqrt(n) ||w||_2). Its authors prune the experts where it is largest, since flat weights are the least distinct
(README of ZongfangLiu/AIMER), so the score here is its inverse. Biases are left out: the models of the paper have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from safetensors import safe_open

from softprune.checkpoint.families import Family, family_of, read_config, spec_of
from softprune.checkpoint.headers import TensorIndex
from softprune.checkpoint.mxfp4 import dequantize
from softprune.errors import CheckpointError
from softprune.ranking.criterion import PARAMETERS, Scored, Source
from softprune.ranking.errors import RankError

_BLOCKS, _SCALES = "_blocks", "_scales"
_KEYS = {
    "aimer": ("rms_over_abs_mean", "Root mean square over absolute mean of the expert's weights, the inverse of AIMER (arXiv 2603.18492)."),
    "l1": ("abs_mean", "Absolute mean of the expert's weights."),
}


@dataclass(frozen=True, config=PARAMETERS)
class Weights:
    """One matrix of one expert is in memory at a time.

    Attributes:
        statistic: "aimer", or "l1": the absolute mean, of which larger is better.
    """

    about: ClassVar[str] = "from the checkpoint's weights alone (AIMER or L1)"
    reads: ClassVar[str] = "checkpoint"
    statistic: Literal["aimer", "l1"] = "aimer"

    def tensors(self) -> tuple[str, ...]:
        return ()

    def score(self, source: Source) -> Scored:
        if source.checkpoint is None:
            raise RankError("--model", "", "no checkpoint", "the folder of the model, from whose weights this method ranks")
        config = read_config(source.checkpoint)
        name = str(source.checkpoint / "config.json")
        family, spec, index = family_of(config, name), spec_of(config, name), TensorIndex(source.checkpoint)
        size = (spec.num_layers, spec.num_experts)
        absolute, square, number = (np.zeros(size) for _ in range(3))
        for row, layer in enumerate(spec.moe_layers):
            for expert, stem, matrix in _matrices(index, family, layer, spec.num_experts):
                values = matrix.double()
                absolute[row, expert] += float(values.abs().sum())
                square[row, expert] += float(values.square().sum())
                number[row, expert] += values.numel()
                if source.progress:
                    source.progress(stem, matrix.nbytes)
        mean = absolute / number
        if not np.all(mean > 0):
            row, expert = np.argwhere(~(mean > 0))[0]
            found = f"weights of expert {expert} in MoE layer {row} that are all 0 or not finite"
            raise CheckpointError(str(source.checkpoint), "experts", found, "finite weights")
        key, definition = _KEYS[self.statistic]
        return Scored(np.sqrt(square / number) / mean if self.statistic == "aimer" else mean, key, definition)


def _matrices(index: TensorIndex, family: Family, layer: int, num_experts: int) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(expert, name, matrix) of all of a layer's experts; MXFP4 is decoded one expert at a time."""
    for pattern in family.expert_tensors:
        if pattern.endswith(("_bias", _SCALES)):
            continue
        for expert in range(num_experts):
            name = pattern.format(layer=layer, expert=expert)
            if family.expert_index:
                yield expert, name, index.load(name)
            elif name.endswith(_BLOCKS):
                stem = name.removesuffix(_BLOCKS)
                blocks, scales = (_of_expert(index, stem + end, expert) for end in (_BLOCKS, _SCALES))
                yield expert, stem, dequantize(blocks, scales)
            else:
                yield expert, name, _of_expert(index, name, expert)


def _of_expert(index: TensorIndex, name: str, expert: int) -> torch.Tensor:
    """One row of a tensor whose first dimension is the expert; nothing else is read."""
    if name not in index:
        raise CheckpointError(str(index.model_dir), name, "no such tensor", "a tensor of this name")
    with safe_open(index.tensors[name].shard, framework="pt") as file:
        row: torch.Tensor = file.get_slice(name)[expert : expert + 1]
    return row
