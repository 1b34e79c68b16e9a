"""What a rewrite will do: every byte range of the new shards, and where it comes from. Reads headers and routers only.

Tensors keep the source's order, so that both sides are read and written from front to back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from softprune.checkpoint.families import Family, ModelSpec, family_of, read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.checkpoint.headers import DTYPE_BYTES, INDEX, TensorIndex, TensorInfo, payload_bytes
from softprune.checkpoint.mask_fit import kept_number, mask_top_k
from softprune.checkpoint.places import looks_like_experts, place_of, renumbered, tensors_of_layer
from softprune.checkpoint.side_files import SideFiles, side_files
from softprune.checkpoint.writer import MAX_SHARD_BYTES, plan_shards
from softprune.errors import CheckpointError, MaskError
from softprune.mask import ExpertMask

MINUS_INFINITY = b"\x80\xff"
"""A BF16 router bias that no top-k picks."""


@dataclass(frozen=True)
class Copied:
    """Bytes of a source file, from `start`."""

    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Filled:
    """Bytes that no source holds: `pattern`, over and over."""

    pattern: bytes
    num_bytes: int


Piece = Copied | Filled


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the new checkpoint: the pieces that follow one another in its payload, and the source tensor's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    source: str

    @property
    def num_bytes(self) -> int:
        """Size of the payload in bytes."""
        return payload_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class RewritePlan:
    """A rewrite, decided.

    Attributes:
        source, index, family, spec: the checkpoint that is read.
        mask: as given.
        num_experts: experts a layer of the new checkpoint, padding included.
        top_k: experts per token of the new checkpoint.
        pad_to: as asked for, or None.
        layers: decoder layers of a dry run, ascending, or None for the whole model.
        fingerprint: the source's; None where layers are missing from it.
        warnings: to be shown.
        max_shard_bytes: largest payload of a shard.
        shards: the new tensors, shard by shard.
        side: the other files.
    """

    source: Path
    index: TensorIndex = field(repr=False)
    family: Family
    spec: ModelSpec
    mask: ExpertMask = field(repr=False)
    num_experts: int
    top_k: int
    pad_to: int | None
    layers: tuple[int, ...] | None
    fingerprint: str | None
    warnings: tuple[str, ...]
    max_shard_bytes: int
    shards: tuple[tuple[PlannedTensor, ...], ...] = field(repr=False)
    side: SideFiles = field(repr=False)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layers that are pruned."""
        return tuple(layer for layer in self.spec.moe_layers if self.layers is None or layer in self.layers)

    def kept(self, layer: int) -> list[int]:
        """Old ids kept in a decoder layer, ascending; the new id is the position."""
        return self.mask.kept(self.spec.moe_layers.index(layer))

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """Every new tensor."""
        return itertools.chain.from_iterable(self.shards)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of all new tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of source tensors and other files that are read."""
        pieces = (piece for tensor in self.tensors for piece in tensor.pieces)
        return sum(piece.num_bytes for piece in pieces if isinstance(piece, Copied)) + self.side.num_bytes

    @property
    def bytes_written(self) -> int:
        """Bytes of new tensors and copied files; headers, config, index, mapping, manifest and card add less than a megabyte or two."""
        return self.payload_bytes + self.side.num_bytes

    def pruned_bytes(self) -> int:
        """Bytes of new routers and experts."""
        return sum(tensor.num_bytes for tensor in self.tensors if place_of(self.family, tensor.name).is_pruned)

    def shards_touched(self, layer: int) -> list[str]:
        """Source shards that hold a router or expert tensor of a decoder layer."""
        names = set(tensors_of_layer(self.family, layer, self.spec.num_experts))
        return sorted({self.index.tensors[tensor.source].shard.name for tensor in self.tensors if tensor.source in names})


def plan_rewrite(
    model_dir: str | Path,
    mask: ExpertMask,
    mask_file: str = "mask",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    pad_to: int | None = None,
    layers: Sequence[int] | None = None,
    force: bool = False,
) -> RewritePlan:
    """Decide a rewrite and refuse what cannot be rewritten, without writing.

    Args:
        model_dir: the checkpoint, whole; or a part of one, if `layers` names what is there.
        mask: what stays.
        mask_file: its name for errors.
        max_shard_bytes: a shard is closed before a tensor that would exceed this payload.
        pad_to: fill every layer up to so many experts with some that no token can reach; gpt-oss only, since that takes a router bias.
        layers: rewrite these decoder layers only, as a dry run.
        force: accept a mask that was made for other weights.

    Raises:
        CheckpointError: the source is damaged, incomplete, or not of a known family.
        MaskError: the mask is another model's, or no checkpoint can express it.
    """
    source = Path(model_dir)
    config = read_config(source)
    name = str(source / "config.json")
    family, spec, index = family_of(config, name), spec_of(config, name), TensorIndex(source)
    mask.check_model(spec, mask_file)
    if max_shard_bytes < 1:
        raise CheckpointError("--max-shard-size", "", str(max_shard_bytes), "a positive number of bytes")
    num_kept = kept_number(mask, mask_file, family, pad_to)
    chosen = None if layers is None else _chosen(layers, spec)
    _check_tensors(family, spec, index, spec.moe_layers if chosen is None else chosen, chosen is None)
    fingerprint, warnings = _fingerprint(source, index, family, spec, mask, mask_file, force)
    planned = _tensors(index, family, spec, mask, num_kept, chosen)
    return RewritePlan(
        source, index, family, spec, mask, num_kept, mask_top_k(mask, mask_file), pad_to, chosen, fingerprint, warnings,
        max_shard_bytes, tuple(map(tuple, plan_shards(planned, max_shard_bytes))), side_files(source, index),
    )  # fmt: skip


def _chosen(layers: Sequence[int], spec: ModelSpec) -> tuple[int, ...]:
    bad = [layer for layer in layers if layer not in spec.moe_layers]
    if bad or not layers:
        found = str(bad[0]) if bad else "none"
        raise CheckpointError("--layers", "", found, f"decoder layers with experts, of {spec.moe_layers[0]} to {spec.moe_layers[-1]}")
    return tuple(sorted(set(layers)))


def _check_tensors(family: Family, spec: ModelSpec, index: TensorIndex, layers: Sequence[int], whole: bool) -> None:
    """Every router and expert tensor is there, with the experts that the config says, and there is none that the family does not know."""
    for layer in layers:
        for name in tensors_of_layer(family, layer, spec.num_experts):
            info = index.tensors.get(name)
            if info is None:
                hint = "" if whole else "; --layers names layers that the checkpoint holds"
                raise CheckpointError(str(index.model_dir), name, "no such tensor", f"one, as {family.name} has in each layer{hint}")
            if place_of(family, name).rows_are_experts and info.shape[:1] != (spec.num_experts,):
                expected = f"{spec.num_experts} experts in the first dimension, as config.json says"
                raise CheckpointError(str(info.shard), name, f"shape {list(info.shape)}", expected)
            wanted = "U8" if name.endswith(("_blocks", "_scales")) else None
            if wanted and info.dtype != wanted:
                raise CheckpointError(str(info.shard), name, f"dtype {info.dtype}", f"{wanted}, as MXFP4 is stored")
    for name, info in index.tensors.items():
        place = place_of(family, name)
        if index.weight_map and name not in index.weight_map:
            raise CheckpointError(str(info.shard), name, f"a tensor that {INDEX} does not list", "each tensor in the index")
        unknown = not place.is_pruned and looks_like_experts(name)
        beyond = place.is_pruned and (place.layer not in spec.moe_layers or (place.expert or 0) >= spec.num_experts)
        if unknown or beyond:
            raise CheckpointError(
                str(info.shard), name, "a router or expert tensor that has no place in this model",
                f"those of {family.name}, {spec.num_layers} layers with {spec.num_experts} experts",
            )  # fmt: skip


def _fingerprint(
    source: Path, index: TensorIndex, family: Family, spec: ModelSpec, mask: ExpertMask, mask_file: str, force: bool
) -> tuple[str | None, tuple[str, ...]]:
    """The source's fingerprint (None for a part of a model) once the mask is known to be made for it, and warnings."""
    if all(family.router_weight.format(layer=layer) in index for layer in spec.moe_layers):
        fingerprint = fingerprint_of_checkpoint(source)
        warning = mask.check_fingerprint(fingerprint, mask_file, force)
        return fingerprint, (warning,) if warning else ()
    if mask.model.fingerprint is not None and not force:
        raise MaskError(
            mask_file, "model.fingerprint", mask.model.fingerprint,
            f"null: {source} lacks layers, so it has no fingerprint to compare with; --expert-mask-force uses the mask all the same",
        )  # fmt: skip
    return None, (f"{source}: layers are missing, so nothing says that this mask was made for these weights",)


def _tensors(
    index: TensorIndex, family: Family, spec: ModelSpec, mask: ExpertMask, num_experts: int, layers: tuple[int, ...] | None
) -> Iterator[PlannedTensor]:
    position = {layer: i for i, layer in enumerate(spec.moe_layers)}
    for name, info in index.tensors.items():
        place = place_of(family, name)
        if layers is not None and place.layer not in layers:
            continue
        if not place.is_pruned:
            yield PlannedTensor(name, info.dtype, info.shape, (Copied(info.shard, info.start, info.num_bytes),), name)
            continue
        assert place.layer is not None
        kept = mask.kept(position[place.layer])
        if place.expert is None:
            pieces: tuple[Piece, ...] = (*_rows(info, kept), *_padding(info, family, num_experts - len(kept)))
            yield PlannedTensor(name, info.dtype, (num_experts, *info.shape[1:]), pieces, name)
        elif place.expert in kept:
            new = renumbered(family, name, kept.index(place.expert))
            yield PlannedTensor(new, info.dtype, info.shape, (Copied(info.shard, info.start, info.num_bytes),), name)


def _rows(info: TensorInfo, kept: Sequence[int]) -> Iterator[Copied]:
    """One piece for each run of neighbours."""
    row = info.num_bytes // info.shape[0]
    for _, run in itertools.groupby(enumerate(kept), lambda item: item[1] - item[0]):
        ids = [expert for _, expert in run]
        yield Copied(info.shard, info.start + ids[0] * row, len(ids) * row)


def _padding(info: TensorInfo, family: Family, number: int) -> Iterator[Filled]:
    """Experts of zeros, whose router bias is minus infinity: whatever the token, the others' logits are larger."""
    if number:
        is_bias = family.router_bias is not None and info.name.endswith(family.router_bias.rsplit("{layer}", 1)[1])
        if is_bias and info.dtype != "BF16":
            raise CheckpointError(str(info.shard), info.name, f"dtype {info.dtype}", "BF16, the only router bias that --pad-to can fill")
        row = info.num_bytes // info.shape[0]
        yield Filled(MINUS_INFINITY if is_bias else bytes(DTYPE_BYTES[info.dtype]), number * row)
