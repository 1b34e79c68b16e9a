"""The expert mask file: which experts may be routed to, per MoE layer, and how many per token.

The rules (DESIGN: "The mask file") are checked in two steps: `ExpertMask` holds what can be said
of the file alone, `ExpertMask.check_model` what can be said of it and a model.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softprune.checkpoint.families import ModelSpec
from softprune.errors import MaskError, shortened
from softprune.files import write_whole

FORMAT: Final = "softprune.expert-mask"
VERSION: Final = 1
MAX_BYTES = 16_000_000
"""Largest mask file or request body that is read (16 MB, decimal)."""

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class MaskModel(BaseModel):
    """The model that a mask was made for.

    `num_layers` counts MoE layers; `fingerprint` is that of `softprune.checkpoint.fingerprint`, or None.
    """

    model_config = _STRICT

    architecture: str
    num_layers: int = Field(ge=1, le=10_000)
    num_experts: int = Field(ge=1, le=100_000)
    top_k: int = Field(ge=1)
    fingerprint: str | None = Field(default=None, pattern=r"^sha256:[0-9a-f]{64}$")

    @classmethod
    def of(cls, spec: ModelSpec, fingerprint: str | None = None) -> MaskModel:
        """A model of this shape, with its own top_k."""
        return cls(
            architecture=spec.architecture, num_layers=spec.num_layers, num_experts=spec.num_experts, top_k=spec.top_k,
            fingerprint=fingerprint,
        )  # fmt: skip

    @property
    def spec(self) -> ModelSpec:
        """As a model's shape, with MoE layers numbered from 0."""
        return ModelSpec(self.architecture, tuple(range(self.num_layers)), self.num_experts, self.top_k)


class ExpertMask(BaseModel):
    """A mask that obeys every rule that can be checked without the model.

    Attributes:
        model: the model it was made for.
        keep: per MoE layer the ids kept, ascending, or None for the whole layer.
        top_k: experts per token; None leaves the model's own, a list gives one per layer.
        provenance: how the mask came about; free-form.
    """

    model_config = _STRICT

    format: Literal["softprune.expert-mask"] = FORMAT
    version: Literal[1] = VERSION
    model: MaskModel
    keep: list[list[int] | None]
    top_k: int | list[int] | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def parse(cls, data: Any, source: str) -> ExpertMask:
        """Build a mask from decoded JSON; ids in the wrong order are sorted.

        Args:
            data: the decoded JSON document.
            source: the file's name for errors.

        Raises:
            MaskError: any rule is broken; the message names the field, what was found and expected.
        """
        if not isinstance(data, dict):
            raise MaskError(source, "", f"a JSON {_json_type(data)}", f'an object with "format": "{FORMAT}"')
        if data.get("format") != FORMAT:
            raise MaskError(source, "format", shortened(data.get("format")), f'"{FORMAT}"; other forms go through `softprune mask convert`')
        if data.get("version") != VERSION or isinstance(data.get("version"), bool):
            raise MaskError(source, "version", shortened(data.get("version")), str(VERSION))
        try:
            mask = cls.model_validate(data)
        except ValidationError as error:
            _raise_first(error, source)
        mask = mask.model_copy(update={"keep": [None if ids is None else sorted(ids) for ids in mask.keep]})
        mask._check_rules(source)
        return mask

    def _check_rules(self, source: str) -> None:
        model = self.model
        if model.top_k > model.num_experts:
            raise MaskError(source, "model.top_k", str(model.top_k), f"at most model.num_experts = {model.num_experts}")
        if len(self.keep) != model.num_layers:
            raise MaskError(source, "keep", f"{len(self.keep)} layers", f"model.num_layers = {model.num_layers} layers")
        if isinstance(self.top_k, list) and len(self.top_k) != model.num_layers:
            raise MaskError(source, "top_k", f"a list of {len(self.top_k)}", f"one number, or one for each of {model.num_layers} layers")
        for layer, ids in enumerate(self.keep):
            field = f"keep[{layer}]"
            if ids is not None:
                bad = [i for i in ids if not 0 <= i < model.num_experts]
                if bad:
                    raise MaskError(source, field, f"expert id {bad[0]}", f"ids from 0 to {model.num_experts - 1}")
                repeated = [a for a, b in itertools.pairwise(ids) if a == b]
                if repeated:
                    raise MaskError(source, field, f"expert id {repeated[0]} more than once", "each id once")
            top_k, name = self.layer_top_k(layer), f"top_k[{layer}]" if isinstance(self.top_k, list) else "top_k"
            if not 1 <= top_k <= model.top_k:
                raise MaskError(source, name, str(top_k), f"from 1 to the model's own top_k = {model.top_k}")
            if ids is not None and len(ids) < top_k:
                raise MaskError(source, field, f"{len(ids)} experts kept", f"at least top_k = {top_k}, since a router picks that many")

    def layer_top_k(self, layer: int) -> int:
        """Experts per token in one MoE layer under this mask."""
        if self.top_k is None:
            return self.model.top_k
        return self.top_k[layer] if isinstance(self.top_k, list) else self.top_k

    def kept(self, layer: int) -> list[int]:
        """Ids kept in one MoE layer, ascending."""
        ids = self.keep[layer]
        return list(range(self.model.num_experts)) if ids is None else ids

    def pruned(self, layer: int) -> list[int]:
        """Ids pruned in one MoE layer, ascending."""
        return sorted(set(range(self.model.num_experts)) - set(self.kept(layer)))

    @property
    def num_kept(self) -> list[int]:
        """Number of experts kept, per MoE layer."""
        return [len(self.kept(layer)) for layer in range(self.model.num_layers)]

    @property
    def summary(self) -> str:
        """What is kept, in a few words: "24 of 32 experts kept" or "8 to 24 of 32 experts kept"."""
        counts = self.num_kept
        span = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        return f"{span} of {self.model.num_experts} experts kept"

    @property
    def hash(self) -> str:
        """Identity of what the mask does: two masks share it exactly if they route alike on one model.

        SHA-256 of the canonical JSON of `[num_experts, keep with null spelled out, top_k per layer]`.
        """
        layers = range(self.model.num_layers)
        what = [self.model.num_experts, [self.kept(i) for i in layers], [self.layer_top_k(i) for i in layers]]
        return "sha256:" + hashlib.sha256(json.dumps(what, separators=(",", ":")).encode()).hexdigest()

    def check_model(self, spec: ModelSpec, source: str) -> None:
        """Refuse a mask that was made for a model of another shape.

        Raises:
            MaskError: architecture, MoE layers, experts or top_k differ.
        """
        model = self.model
        for field, found, expected in (
            ("architecture", model.architecture, spec.architecture),
            ("num_layers", model.num_layers, spec.num_layers),
            ("num_experts", model.num_experts, spec.num_experts),
            ("top_k", model.top_k, spec.top_k),
        ):
            if found != expected:
                raise MaskError(source, f"model.{field}", str(found), f"{expected}, as the model has")

    def check_fingerprint(self, fingerprint: str, source: str, force: bool = False) -> str | None:
        """Refuse a mask that was made for other weights.

        Args:
            fingerprint: the model's.
            force: accept another model's fingerprint (`--expert-mask-force`).

        Returns:
            A warning to show, or None.

        Raises:
            MaskError: the fingerprints differ and `force` is not given.
        """
        mine = self.model.fingerprint
        if mine is None:
            return f"{source}: model.fingerprint is null, so nothing says that this mask was made for these weights"
        if mine == fingerprint:
            return None
        if force:
            return f"{source}: model.fingerprint {mine[:19]}… is not the model's {fingerprint[:19]}…; used since it was forced"
        raise MaskError(
            source, "model.fingerprint", mine, f"{fingerprint}, that of the model (a server's --expert-mask-force uses it all the same)"
        )

    def dump(self) -> str:
        """The file's text: JSON, one line per layer."""
        rows = ",\n  ".join(json.dumps(ids, separators=(", ", ": ")) for ids in self.keep)
        head = {"format": self.format, "version": self.version, "model": self.model.model_dump()}
        fields = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        fields.append(f'"keep": [\n  {rows}]')
        fields.append(f'"top_k": {json.dumps(self.top_k)}')
        fields.append(f'"provenance": {json.dumps(self.provenance)}')
        return "{" + ",\n ".join(fields) + "}\n"

    def save(self, path: str | Path) -> None:
        """Write the file; it appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.dump())


def load(path: str | Path) -> ExpertMask:
    """Read a mask file.

    Raises:
        MaskError: it is missing, too large, not JSON, or breaks a rule.
    """
    return ExpertMask.parse(read_json(path), str(path))


def read_json(path: str | Path) -> Any:
    """Decode a JSON file of at most `MAX_BYTES`.

    Raises:
        MaskError: missing, too large, not UTF-8 JSON, nested too deep, or a key given twice.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MaskError(str(path), "", error.strerror or str(error), "a readable mask file") from None
    if len(data) > MAX_BYTES:
        raise MaskError(str(path), "", "over 16 MB", "at most 16 MB")
    return decode_json(data, str(path))


def decode_json(data: bytes, source: str) -> Any:
    """As `read_json`, for bytes already read."""

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        decoded = dict(pairs)
        if len(decoded) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise MaskError(source, twice, "this key twice in one object", "it once")
        return decoded

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise MaskError(source, "", "JSON nested too deep", "a mask file") from None
    except ValueError as error:
        raise MaskError(source, "", f"no valid JSON ({error})", "JSON in UTF-8") from None


def _raise_first(error: ValidationError, source: str) -> NoReturn:
    """The first complaint of pydantic, in our words."""
    first = error.errors()[0]
    # A union's branches end a location with type names; the path a reader knows ends before them.
    path = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    field = field.removesuffix(".int")
    if first["type"] == "missing":
        raise MaskError(source, field, "nothing", "this field")
    if first["type"] == "extra_forbidden":
        raise MaskError(source, field, "an unknown field", f"the fields of version {VERSION}")
    raise MaskError(source, field, shortened(first["input"]), first["msg"].removeprefix("Input should be "))


def _json_type(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
