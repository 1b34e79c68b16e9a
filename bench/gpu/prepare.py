"""Checkpoints and masks of a run, in its working folder; what is there already stays, if it is what would be made."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import typer

from softprune.bench.masks import random_mask
from softprune.bench.tiny.weights import TRAINED
from softprune.checkpoint.dequantize import dequantize_checkpoint
from softprune.checkpoint.families import Config, ModelSpec, read_config, spec_of
from softprune.checkpoint.presets import PRESETS
from softprune.checkpoint.rewrite import rewrite
from softprune.checkpoint.synth import synth_checkpoint
from softprune.errors import CheckpointError
from softprune.mask import ExpertMask

SEEDS = {24: 1, 16: 6}
"""Of the masks, by experts kept; those of tests/gpu."""
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
SYNTH_S, REWRITE_S = 50.0, 15.0
"""Estimates: 35 s and 10 s were measured (docs/rewriting.md, docs/proof.md), on 2 cores."""


def masks_for(work: Path) -> dict[int, ExpertMask]:
    """Random masks of the base checkpoint, by experts kept; the same ones in every run."""
    return {keep: random_mask(work / "base", keep, seed) for keep, seed in SEEDS.items()}


def prepare_seconds(work: Path, models: Iterable[str]) -> float:
    """Estimate of what `prepare` takes."""
    return sum(REWRITE_S if name != "base" else SYNTH_S for name in {"base", *models} if not (work / name).exists())


def prepare(work: Path, models: Iterable[str], preset: str) -> None:
    """Make the checkpoints that are not there.

    Args:
        work: the working folder.
        models: "base", and "rewritten24" and the like.
        preset: "tiny" for the small trained gpt-oss as BF16, which CPUs can serve; else random weights of this shape, in MXFP4.

    Raises:
        CheckpointError: a checkpoint that is there has another shape. Of the same shape, `run_file` tells others by their fingerprint.
    """
    work.mkdir(parents=True, exist_ok=True)
    base, part = work / "base", work / ".base.part"
    if not base.exists():
        began = time.monotonic()
        shutil.rmtree(part, ignore_errors=True)
        if preset == "tiny":
            dequantize_checkpoint(TRAINED, part)
        else:
            synth_checkpoint(preset, part, "mxfp4", seed=0)
        part.rename(base)
        _say(base, began)
    shape = read_config(TRAINED) if preset == "tiny" else PRESETS[preset]
    _check_shape(base, shape, spec_of(shape))
    for name in models:
        if not (match := re.fullmatch(r"rewritten(\d+)", name)):
            continue
        if (work / name).exists():
            _check_shape(work / name, shape, replace(spec_of(shape), num_experts=int(match[1])))
        else:
            began = time.monotonic()
            rewrite(base, masks_for(work)[int(match[1])], work / name, verify=False)
            _say(work / name, began)


def _check_shape(folder: Path, shape: Config, spec: ModelSpec) -> None:
    """See that a checkpoint has the experts and layers of `spec`, and the other sizes of `shape`."""
    config, source = read_config(folder), str(folder / "config.json")
    if (found := spec_of(config, source)) != spec:
        raise CheckpointError(source, "", str(found), f"{spec}, or another WORK_DIR")
    for name in SIZES:
        if config.get(name) != shape.get(name):
            raise CheckpointError(source, name, repr(config.get(name)), f"{shape.get(name)!r}, or another WORK_DIR")


def _say(folder: Path, began: float) -> None:
    typer.echo(f"{folder.name}: made in {time.monotonic() - began:.0f} s")
