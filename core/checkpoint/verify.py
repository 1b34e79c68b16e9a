"""Proves that a rewritten checkpoint is what its mapping says of its source, from the files alone.

Nothing of the code that plans and writes is used, but the table of families and the names of files: what each new tensor has
to be is worked out again from its own name.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from softprune.checkpoint.compare import Expected, compare_shard
from softprune.checkpoint.copying import WORKERS, in_parallel, read_ranges
from softprune.checkpoint.families import Family, ModelSpec, family_of, read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.checkpoint.headers import INDEX, TensorIndex
from softprune.checkpoint.manifest import Manifest, read_manifest
from softprune.checkpoint.places import place_of, renumbered
from softprune.checkpoint.side_files import CARD, CONFIG, MANIFEST, MAPPING, RECIPE, WRITTEN, is_weights
from softprune.checkpoint.writer import Progress
from softprune.errors import CheckpointError, MaskError, SoftpruneError, shortened
from softprune.mask import ExpertMask


@dataclass
class Verification:
    """What was compared, and what was wrong.

    Attributes:
        source, out: the folders.
        problems: one for each thing that is not as it should be; empty means proven.
        num_tensors, num_bytes: tensors and bytes of the new checkpoint that were compared with the source.
        num_experts, num_padding: experts compared, and experts of padding that were seen to be out of reach, over all layers.
    """

    source: Path
    out: Path
    problems: list[SoftpruneError] = field(default_factory=list)
    num_tensors: int = 0
    num_bytes: int = 0
    num_experts: int = 0
    num_padding: int = 0

    def check(self) -> None:
        """Raise the first problem, if there is one.

        Raises:
            CheckpointError: the new checkpoint is not what it should be.
        """
        if self.problems:
            raise self.problems[0]


def verify_checkpoint(
    source_dir: str | Path, out_dir: str | Path, workers: int = WORKERS, progress: Progress = lambda name, num_bytes: None
) -> Verification:
    """Compare a rewritten checkpoint with the one it was made from, byte for byte.

    Proven when there are no problems: the manifest is as written and names every file with its SHA-256; the mapping is a bijection
    and the mask's; config and index are those of a smaller model, with nothing else changed; every tensor that should be there is,
    in one shard, and no other; each kept expert's bytes and every other tensor's equal the source's; padding cannot be reached;
    copied files equal the source's.

    Args:
        source_dir, out_dir: the two folders.
        workers: shards compared at a time.
        progress: told of bytes compared, from any worker.

    Raises:
        CheckpointError: the source cannot be read.
    """
    source, out = Path(source_dir), Path(out_dir)
    config = read_config(source)
    family, spec, index = family_of(config, str(source / CONFIG)), spec_of(config, str(source / CONFIG)), TensorIndex(source)
    found = Verification(source, out)
    try:
        manifest = read_manifest(out)
        mask = ExpertMask.parse(manifest.mask, str(out / MANIFEST))
        mask.check_model(spec, str(out / MANIFEST))
        new = TensorIndex(out)
    except (CheckpointError, MaskError) as error:
        found.problems.append(error)
        return found
    layers = {layer: i for i, layer in enumerate(spec.moe_layers) if manifest.layers is None or layer in manifest.layers}
    kept = {layer: mask.kept(position) for layer, position in layers.items()}
    found.problems += _check_manifest(manifest, mask, source, out, spec, index, family)
    found.problems += _check_mapping(out, {str(position): mask.kept(position) for position in layers.values()})
    found.problems += _check_config(config, out, family, manifest)
    found.problems += _check_index(out, new, manifest)
    found.problems += _check_names(index, new, family, kept, manifest)
    found.problems += _check_files(source, out, manifest, new)

    def compare(shard: Path, stop: threading.Event) -> list[SoftpruneError]:
        stored = manifest.files.get(shard.name)
        by_manifest = None if stored is None else (stored.bytes, stored.sha256)
        expected = Expected(index, family, kept, manifest.num_experts)
        return compare_shard(shard, new, expected, by_manifest, partial(progress, f"verifying {shard.name}"), stop)

    for problems in in_parallel(new.shards, compare, lambda shard: shard.stat().st_size, workers):
        found.problems += problems
    found.num_tensors, found.num_bytes = len(new.tensors), new.num_bytes
    found.num_experts = sum(map(len, kept.values()))
    found.num_padding = sum(manifest.num_experts - len(ids) for ids in kept.values())
    return found


def _check_manifest(
    manifest: Manifest, mask: ExpertMask, source: Path, out: Path, spec: ModelSpec, index: TensorIndex, family: Family
) -> Iterator[SoftpruneError]:
    file = str(out / MANIFEST)
    whole = all(family.router_weight.format(layer=layer) in index for layer in spec.moe_layers)
    fingerprint = fingerprint_of_checkpoint(source) if whole else None
    numbers = set(mask.num_kept)
    wanted_experts = manifest.pad_to if manifest.pad_to is not None else max(numbers)
    earlier = source / MANIFEST
    recipe = manifest.files.get(RECIPE)
    for name, is_, should in (
        ("mask_hash", manifest.mask_hash, mask.hash),
        ("num_experts", manifest.num_experts, wanted_experts),
        ("top_k", [manifest.top_k], sorted({mask.layer_top_k(layer) for layer in range(spec.num_layers)})),
        ("base.architecture", manifest.base.architecture, spec.architecture),
        ("base.num_layers", manifest.base.num_layers, spec.num_layers),
        ("base.num_experts", manifest.base.num_experts, spec.num_experts),
        ("base.top_k", manifest.base.top_k, spec.top_k),
        ("base.fingerprint", manifest.base.fingerprint, fingerprint),
        ("base.manifest", manifest.base.manifest, "sha256:" + _sha256(earlier) if earlier.is_file() else None),
        ("recipe", manifest.recipe, f"sha256:{recipe.sha256}" if recipe else None),
    ):
        if is_ != should:
            yield CheckpointError(file, name, str(is_), str(should))
    if manifest.pad_to is None and len(numbers) != 1:
        yield CheckpointError(file, "mask.keep", f"{min(numbers)} to {max(numbers)} experts kept", "one number, or pad_to")
    if manifest.pad_to is not None and (manifest.pad_to < max(numbers) or family.router_bias is None):
        yield CheckpointError(file, "pad_to", str(manifest.pad_to), f"at least {max(numbers)}, in a family whose routers have a bias")


def _check_mapping(out: Path, kept: Mapping[str, Sequence[int]]) -> Iterator[SoftpruneError]:
    path = out / MAPPING
    mapping = _json(path)
    if isinstance(mapping, SoftpruneError):
        yield mapping
        return
    if set(mapping) != set(kept):
        yield CheckpointError(str(path), "", f"layers {sorted(mapping, key=str)}", f"layers {sorted(kept, key=int)}")
        return
    for layer, ids in kept.items():
        row = mapping[layer]
        if not isinstance(row, dict) or sorted(row.values(), key=str) != sorted(range(len(ids)), key=str):
            yield CheckpointError(str(path), layer, shortened(row), f"the new ids from 0 to {len(ids) - 1}, once each")
        elif row != {str(old): new for new, old in enumerate(ids)}:
            yield CheckpointError(str(path), layer, shortened(row), f"the ids that the mask keeps, in order: {shortened(list(ids))}")


def _check_config(config: Mapping[str, Any], out: Path, family: Family, manifest: Manifest) -> Iterator[SoftpruneError]:
    path = out / CONFIG
    new = _json(path)
    if isinstance(new, SoftpruneError):
        yield new
        return
    numbers = {family.num_experts_key: manifest.num_experts}
    for name in ("num_experts", "num_local_experts"):
        if config.get(name) == config[family.num_experts_key]:
            numbers[name] = manifest.num_experts
    numbers |= {name: manifest.top_k for name in family.top_k_keys if name in config}
    for name in sorted({*config, *new}):
        expected = numbers.get(name, config.get(name))
        if name not in new or name not in config or new[name] != expected or type(new[name]) is not type(expected):
            should = shortened(expected) if name in config else "no such field, as in the source"
            yield CheckpointError(str(path), name, shortened(new[name]) if name in new else "nothing", should)


def _check_index(out: Path, new: TensorIndex, manifest: Manifest) -> Iterator[SoftpruneError]:
    path = out / INDEX
    if len(new.shards) == 1 and not path.exists():
        return
    document = _json(path)
    if isinstance(document, SoftpruneError):
        yield document
        return
    total = (document.get("metadata") or {}).get("total_size")
    if total != new.num_bytes:
        yield CheckpointError(str(path), "metadata.total_size", str(total), f"{new.num_bytes}, the size of all tensors")
    for name, info in new.tensors.items():
        if name not in new.weight_map:
            yield CheckpointError(str(path), name, "nothing", f"{info.shard.name}, which holds it")
    for shard in new.shards:
        sizes = [info.num_bytes for info in new.tensors.values() if info.shard == shard]
        if sum(sizes) > manifest.max_shard_bytes and len(sizes) > 1:
            yield CheckpointError(str(shard), "", f"{sum(sizes):,} bytes of tensors", f"at most {manifest.max_shard_bytes:,}")


def _check_names(
    index: TensorIndex, new: TensorIndex, family: Family, kept: Mapping[int, Sequence[int]], manifest: Manifest
) -> Iterator[SoftpruneError]:
    """Every tensor that should be there is, with its dtype and shape, and no other."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, info in index.tensors.items():
        place = place_of(family, name)
        if manifest.layers is not None and place.layer not in manifest.layers:
            continue
        if place.expert is not None:
            ids = kept.get(-1 if place.layer is None else place.layer, ())
            if place.expert in ids:
                expected[renumbered(family, name, ids.index(place.expert))] = info.dtype, info.shape
        else:
            expected[name] = info.dtype, (manifest.num_experts, *info.shape[1:]) if place.rows_are_experts else info.shape
    for name in sorted({*expected, *new.tensors}):
        if name not in new.tensors:
            yield CheckpointError(str(new.model_dir), name, "no such tensor", "one, as the source and the mask say")
        elif name not in expected:
            yield CheckpointError(str(new.tensors[name].shard), name, "a tensor", "none of this name")
        elif (new.tensors[name].dtype, new.tensors[name].shape) != expected[name]:
            here = new.tensors[name]
            dtype, shape = expected[name]
            yield CheckpointError(str(here.shard), name, f"{here.dtype} {list(here.shape)}", f"{dtype} {list(shape)}")


def _check_files(source: Path, out: Path, manifest: Manifest, new: TensorIndex) -> Iterator[SoftpruneError]:
    """No file is missing or too many, all but shards (which are compared elsewhere) have their hash, copied ones are the source's."""
    here = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} - {MANIFEST}
    shards = {shard.name for shard in new.shards}
    for name in sorted(here | set(manifest.files)):
        path = out / name
        if name not in manifest.files or path.is_symlink():
            yield CheckpointError(str(path), "", "a file that the manifest does not name, or a link", f"only files that {MANIFEST} names")
        elif is_weights(name) and name not in shards and name != INDEX:
            yield CheckpointError(str(path), "", "weights beside the shards", "none, since nobody has pruned them")
        elif name not in here:
            yield CheckpointError(str(path), "", "no such file", f"one, as {MANIFEST} says")
        elif name not in shards:
            sha256 = _sha256(path)
            if sha256 != manifest.files[name].sha256:
                yield CheckpointError(str(path), "", f"SHA-256 {sha256}", f"{manifest.files[name].sha256}, as {MANIFEST} says")
            original = source / name
            if name not in WRITTEN and (not original.is_file() or _sha256(original) != sha256):
                yield CheckpointError(str(path), "", f"SHA-256 {sha256}", f"that of {original}, which it is a copy of")
    for name in (CARD, CONFIG, MAPPING, *shards):
        if name not in manifest.files:
            yield CheckpointError(str(out / MANIFEST), "files", f"no {name}", "every file of the checkpoint")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in read_ranges(path, 0, path.stat().st_size):
        digest.update(chunk)
    return digest.hexdigest()


def _json(path: Path) -> Any:
    """A JSON object, or what is wrong with it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return CheckpointError(str(path), "", f"unreadable ({error})", "a JSON object")
    return document if isinstance(document, dict) else CheckpointError(str(path), "", type(document).__name__, "a JSON object")
