"""The lockfile: everything that a run depended on and what it made, by hash. A lock that lies beside a recipe is obeyed."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from softprune import __version__
from softprune.checkpoint.headers import TensorIndex
from softprune.checkpoint.manifest import read_manifest
from softprune.checkpoint.side_files import MANIFEST
from softprune.errors import shortened
from softprune.files import digest_of, digest_of_file, write_whole
from softprune.mask import ExpertMask, MaskModel
from softprune.ranking.scores import Scores
from softprune.recipe.errors import RecipeError
from softprune.recipe.recipe import Recipe

FORMAT: Final = "softprune.lock"
VERSION: Final = 1
_COMPARED = ("recipe", "model", "inputs", "method", "parameters", "tags", "selection", "outputs")
_PACKAGES = ("numpy", "safetensors", "torch")


def lock_path(recipe: Path) -> Path:
    """Where a recipe's lockfile lies: recipe.yaml -> recipe.lock.json."""
    return recipe.with_suffix(".lock.json")


def lock_of(
    recipe: Recipe, recipe_file: Path, folder: Path, model: MaskModel, scores: Scores, mask: ExpertMask, out: Path
) -> dict[str, Any]:
    """The lock of a run, as far as it has come: outputs that are not there yet are null.

    Args:
        recipe, recipe_file: what is run, and its file.
        folder, model: of the model.
        scores, mask: what was ranked and selected.
        out: the checkpoint's folder.

    Raises:
        CheckpointError: the model or a manifest cannot be read.
    """
    index = TensorIndex(folder)
    manifest = read_manifest(out) if (out / MANIFEST).is_file() else None
    profiling: Any = recipe.notes.get("profiling_data") or {}
    sampling = profiling.get("sampling") if isinstance(profiling, dict) else None
    return {
        "format": FORMAT, "version": VERSION,
        "recipe": {"name": recipe.name, "file": recipe_file.name, "sha256": digest_of_file(recipe_file)},
        "model": {
            **model.model_dump(), "base_model": recipe.base_model, "shards": {shard.name: shard.stat().st_size for shard in index.shards},
        },
        "inputs": {**scores.inputs, "sampling": sampling},
        "method": scores.method, "parameters": dict(scores.parameters), "tags": dict(recipe.tags),
        "selection": {
            "budget": {name: str(value) if isinstance(value, float) else value for name, value in recipe.budget.items()},
            "protect": asdict(recipe.protect), "union": None if recipe.union is None else asdict(recipe.union),
            "max_shard_bytes": recipe.max_shard_bytes,
        },
        "versions": {"softprune": __version__, "python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "outputs": {
            "scores": scores.digest, "mask": mask.hash, "mask_file": digest_of(mask.dump().encode()),
            "manifest": None if manifest is None else digest_of_file(out / MANIFEST),
            "files": None if manifest is None else {name: "sha256:" + stored.sha256 for name, stored in sorted(manifest.files.items())},
        },
    }  # fmt: skip


def write_lock(lock: Mapping[str, Any], path: Path) -> None:
    """Write a lockfile; it appears whole or not at all.

    Raises:
        RecipeError: it cannot be written.
    """
    try:
        write_whole(path, json.dumps(lock, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise RecipeError(str(path), "", error.strerror or str(error), "a place that can be written") from None


def read_lock(path: Path) -> dict[str, Any]:
    """Read a lockfile.

    Raises:
        RecipeError: it cannot be read, or is no lockfile.
    """
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(str(path), "", error.strerror or str(error), "a lockfile") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(str(path), "", f"no valid JSON ({error})", "a lockfile") from None
    if not isinstance(lock, dict) or (lock.get("format"), lock.get("version")) != (FORMAT, VERSION):
        found = f"{lock.get('format')!r}, version {lock.get('version')!r}" if isinstance(lock, dict) else shortened(lock)
        raise RecipeError(str(path), "format", found, f"{FORMAT}, version {VERSION}")
    return lock


def check_lock(pinned: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> list[str]:
    """Hold what was found against what is pinned; what either does not know yet (null) is passed over.

    Returns:
        Remarks on versions that differ.

    Raises:
        RecipeError: names the first value that differs.
    """
    for section in _COMPARED:
        _compare(pinned.get(section), found.get(section), section, path)
    versions: Mapping[str, str] = pinned.get("versions") or {}
    return [
        f"{name} is {found['versions'].get(name)}, locked with {old}"
        for name, old in versions.items()
        if found["versions"].get(name) != old
    ]


def _compare(pinned: Any, found: Any, field: str, path: Path) -> None:
    if isinstance(pinned, dict) and isinstance(found, dict):
        for key in sorted({*pinned, *found}):
            _compare(pinned.get(key), found.get(key), f"{field}.{key}", path)
    # As it would read from the file: tuples are lists there.
    elif None not in (pinned, found) and pinned != json.loads(json.dumps(found)):
        raise RecipeError(str(path), field, f"{shortened(found)} now", f"{shortened(pinned)}, as locked; `softprune lock` pins it anew")
