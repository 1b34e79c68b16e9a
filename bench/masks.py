"""Masks for measurements: which experts stay does not matter, how many do."""

from __future__ import annotations

import random
from pathlib import Path

from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.mask import ExpertMask
from softprune.mask_forms import build


def random_mask(model: Path, keep: int | list[int], seed: int = 0, top_k: int | None = None) -> ExpertMask:
    """A mask that keeps so many random experts, the same number in each layer or one for each."""
    spec, rng = spec_of(read_config(model)), random.Random(seed)
    numbers = [keep] * spec.num_layers if isinstance(keep, int) else keep
    rows = [rng.sample(range(spec.num_experts), number) for number in numbers]
    return build(spec, rows, fingerprint_of_checkpoint(model), {"method": "random", "seed": seed}, "random_mask", top_k)
