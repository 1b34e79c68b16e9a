"""manifest.json of a rewritten checkpoint: what it was made from and how, and the SHA-256 of every other file.

The text is canonical and ends in a hash of itself, so that no byte of the folder can change unnoticed. It holds no date and
no path: the same rewrite gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softprune.checkpoint.side_files import MANIFEST
from softprune.errors import CheckpointError, shortened

FORMAT: Final = "softprune.manifest"
_SHA256 = r"^sha256:[0-9a-f]{64}$"
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class Base(BaseModel):
    """The checkpoint that was rewritten: its name, shape and fingerprint (None for a part of a model).

    `manifest` is the SHA-256 of its own manifest.json, if it was rewritten too.
    """

    model_config = _STRICT

    name: str
    architecture: str
    num_layers: int
    num_experts: int
    top_k: int
    fingerprint: str | None = Field(pattern=_SHA256)
    manifest: str | None = Field(pattern=_SHA256)


class Stored(BaseModel):
    """A file: its size in bytes and its SHA-256."""

    model_config = _STRICT

    bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a rewritten checkpoint is.

    Attributes:
        softprune: version that wrote it.
        base: what it was made from.
        num_experts, top_k: of the new checkpoint; experts include those of `pad_to`.
        pad_to: layers were filled up to so many experts with some that no token can reach, or None.
        layers: decoder layers of a dry run, or None for a whole model.
        max_shard_bytes: largest payload of a shard, unless a single tensor exceeds it.
        mask, mask_hash: the expert mask, whole, and what identifies it.
        recipe: SHA-256 of recipe.yaml, or None.
        left_out: files of the source that were not taken along, folders with a slash at the end.
        files: every file but this one, by name.
    """

    model_config = _STRICT

    format: Literal["softprune.manifest"] = FORMAT
    version: Literal[1] = 1
    softprune: str
    base: Base
    num_experts: int
    top_k: int
    pad_to: int | None
    layers: list[int] | None
    max_shard_bytes: int
    mask: dict[str, Any]
    mask_hash: str = Field(pattern=_SHA256)
    recipe: str | None = Field(pattern=_SHA256)
    left_out: list[str]
    files: dict[str, Stored]

    def dump(self) -> str:
        """The file's text; `digest` is the SHA-256 of the text without it."""
        document = self.model_dump()
        return _text({**document, "digest": _digest(document)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a rewritten checkpoint.

    Raises:
        CheckpointError: it is missing, or not to the byte what was written.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
        digest = document.pop("digest")
        manifest = Manifest.model_validate(document)
    except OSError as error:
        raise CheckpointError(str(path), "", error.strerror or str(error), "the manifest of a rewritten checkpoint") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(str(path), field, shortened(first["input"]), first["msg"].removeprefix("Input should be ")) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(str(path), "", f"unreadable ({error!r})", "a manifest with its digest") from None
    if digest != _digest(document):
        raise CheckpointError(str(path), "digest", shortened(digest), f"{_digest(document)}, of what the file says")
    if text != manifest.dump():
        raise CheckpointError(str(path), "", "a text that was changed", "the text as it was written")
    return manifest


def _digest(document: Mapping[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(_text(document).encode()).hexdigest()


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True) + "\n"
