"""A mask turns a checkpoint into a smaller one, byte for byte the kept experts.

Byte ranges are copied through a small buffer for each worker and hashed on the way. The new checkpoint is written beside its
name, verified, and renamed: under its name there is nothing, or a whole checkpoint.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from softprune import __version__
from softprune import mask as mask_file
from softprune.checkpoint.copying import WORKERS, in_parallel, write_pieces
from softprune.checkpoint.families import Config, Family, read_config
from softprune.checkpoint.headers import INDEX
from softprune.checkpoint.manifest import Base, Manifest, Stored
from softprune.checkpoint.model_card import base_model_of, model_card
from softprune.checkpoint.plan import Copied, PlannedTensor, RewritePlan, plan_rewrite
from softprune.checkpoint.side_files import CARD, CONFIG, MANIFEST, MAPPING, RECIPE
from softprune.checkpoint.staging import check_free, clear, renamed_after, sync_folder
from softprune.checkpoint.verify import verify_checkpoint
from softprune.checkpoint.writer import MAX_SHARD_BYTES, Progress, header_of, index_of, json_text, shard_names
from softprune.errors import CheckpointError
from softprune.mask import ExpertMask

MARGIN_BYTES = 16_000_000
"""Room asked for beside what the plan counts, for headers, index, config, manifest and card."""


def rewrite(
    model_dir: str | Path,
    mask: ExpertMask | str | Path,
    out_dir: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    pad_to: int | None = None,
    layers: Sequence[int] | None = None,
    workers: int = WORKERS,
    recipe: str | Path | None = None,
    base_model: str | None = None,
    verify: bool = True,
    force: bool = False,
) -> RewritePlan:
    """Write the checkpoint that a mask describes.

    Args:
        model_dir: checkpoint folder: gpt-oss (MXFP4 or BF16), Qwen3-MoE or Mixtral.
        mask: a mask, or its file.
        out_dir: the folder to make; it must not exist.
        max_shard_bytes, pad_to, layers, force: as in `plan_rewrite`.
        workers: shards written at a time.
        recipe: a recipe file to take along.
        base_model: the base model's Hub name, for the card.
        verify: compare every byte with the source before the folder gets its name.

    Returns:
        What was done.

    Raises:
        CheckpointError: the source is damaged, `out_dir` exists, or there is no room for it.
        MaskError: the mask is another model's, or no checkpoint can express it.
    """
    given = mask if isinstance(mask, ExpertMask) else mask_file.load(mask)
    name = "mask" if isinstance(mask, ExpertMask) else str(mask)
    plan = plan_rewrite(model_dir, given, name, max_shard_bytes, pad_to, layers, force)
    execute(plan, out_dir, workers, recipe, base_model, verify)
    return plan


def execute(
    plan: RewritePlan,
    out_dir: str | Path,
    workers: int = WORKERS,
    recipe: str | Path | None = None,
    base_model: str | None = None,
    verify: bool = True,
    progress: Progress = lambda name, num_bytes: None,
) -> None:
    """Do what a plan says; arguments as in `rewrite`, and `progress` is told of bytes written and then, if so, verified, from any worker.

    Raises:
        CheckpointError: `out_dir` exists, there is no room, a file cannot be read, or what was written is not what should be there.
    """
    out = Path(out_dir)
    check_room(plan, out)
    with renamed_after(out) as folder:
        files = _write_shards(plan, folder, workers, progress)
        files |= _copy_side_files(plan, folder, recipe, progress)
        for name, text in _texts(plan, out.name, base_model_of(plan.source, base_model), recipe is not None).items():
            files[name] = _write_text(folder / name, text)
        manifest = _manifest(plan, files, base_model_of(plan.source, base_model))
        _write_text(folder / MANIFEST, manifest.dump())
        if verify:
            verify_checkpoint(plan.source, folder, workers, progress).check()


def check_room(plan: RewritePlan, out: Path) -> None:
    """Refuse a rewrite that the disk has no room for, or whose name is taken; what a killed run left there is removed first.

    Raises:
        CheckpointError: the name is taken, or there is too little room.
    """
    check_free(out)
    clear(out)
    place = next(folder for folder in (out.parent, *out.absolute().parents) if folder.is_dir())
    free, needed = shutil.disk_usage(place).free, plan.bytes_written + MARGIN_BYTES
    if free < needed:
        raise CheckpointError(str(out), "free space", f"{free:,} bytes on its disk", f"at least {needed:,}, what the plan writes")


def new_config(config: Config, family: Family, num_experts: int, top_k: int) -> dict[str, Any]:
    """config.json with other numbers of experts and of experts per token, under every name that stands there for them."""
    new = dict(config)
    for key in ("num_experts", "num_local_experts"):
        if key == family.num_experts_key or new.get(key) == config[family.num_experts_key]:
            new[key] = num_experts
    for key in family.top_k_keys:
        if key in new:
            new[key] = top_k
    return new


def expert_mapping(plan: RewritePlan) -> dict[str, dict[str, int]]:
    """MoE layer, counted from 0 -> old id -> new id, for every layer that was rewritten."""
    return {
        str(plan.spec.moe_layers.index(layer)): {str(old): new for new, old in enumerate(plan.kept(layer))} for layer in plan.moe_layers
    }


def _write_shards(plan: RewritePlan, folder: Path, workers: int, progress: Progress) -> dict[str, Stored]:
    names = shard_names(len(plan.shards))

    def write(job: tuple[str, tuple[PlannedTensor, ...]], stop: threading.Event) -> Stored:
        name, tensors = job
        pieces = (piece for tensor in tensors for piece in tensor.pieces)
        sha256 = write_pieces(folder / name, header_of(tensors), pieces, partial(progress, name), stop)
        return Stored(bytes=(folder / name).stat().st_size, sha256=sha256)

    jobs = list(zip(names, plan.shards, strict=True))
    stored = in_parallel(jobs, write, lambda job: sum(tensor.num_bytes for tensor in job[1]), workers)
    return dict(zip(names, stored, strict=True))


def _copy_side_files(plan: RewritePlan, folder: Path, recipe: str | Path | None, progress: Progress) -> dict[str, Stored]:
    wanted = {name: (plan.source / name, size) for name, size in plan.side.copied}
    if recipe is not None:
        path = Path(recipe)
        if not path.is_file():
            raise CheckpointError(str(path), "", "no such file", "a recipe")
        wanted[RECIPE] = (path, path.stat().st_size)
    stored = {}
    for name, (file, size) in wanted.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sha256 = write_pieces(folder / name, b"", [Copied(file, 0, size)], partial(progress, name), threading.Event())
        stored[name] = Stored(bytes=size, sha256=sha256)
    for inside in {(folder / name).parent for name in stored} - {folder}:
        sync_folder(inside)
    return stored


def _texts(plan: RewritePlan, name: str, base_model: str, recipe: bool) -> dict[str, str]:
    texts = {
        CONFIG: json_text(new_config(read_config(plan.source), plan.family, plan.num_experts, plan.top_k)),
        MAPPING: json_text(expert_mapping(plan)),
        CARD: model_card(plan, name, base_model, recipe),
    }
    if len(plan.shards) > 1:
        texts[INDEX] = json_text(index_of(shard_names(len(plan.shards)), plan.shards))
    return texts


def _manifest(plan: RewritePlan, files: dict[str, Stored], base_model: str) -> Manifest:
    spec, earlier = plan.spec, plan.source / MANIFEST
    base = Base(
        name=base_model, architecture=spec.architecture, num_layers=spec.num_layers, num_experts=spec.num_experts, top_k=spec.top_k,
        fingerprint=plan.fingerprint,
        manifest="sha256:" + hashlib.sha256(earlier.read_bytes()).hexdigest() if earlier.is_file() else None,
    )  # fmt: skip
    return Manifest(
        softprune=__version__, base=base, num_experts=plan.num_experts, top_k=plan.top_k, pad_to=plan.pad_to,
        layers=None if plan.layers is None else list(plan.layers), max_shard_bytes=plan.max_shard_bytes,
        mask=plan.mask.model_dump(), mask_hash=plan.mask.hash, recipe="sha256:" + files[RECIPE].sha256 if RECIPE in files else None,
        left_out=list(plan.side.left_out), files=files,
    )  # fmt: skip


def _write_text(path: Path, text: str) -> Stored:
    data = text.encode()
    return Stored(bytes=len(data), sha256=write_pieces(path, data, (), lambda num_bytes: None, threading.Event()))
