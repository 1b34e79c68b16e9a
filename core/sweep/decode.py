"""Decode speed of a mask beside the base's, measured in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from softprune.bench.compare import FORMAT, Masks, Urls, compare
from softprune.bench.prompts import Workload
from softprune.errors import SoftpruneError
from softprune.mask import ExpertMask
from softprune.server_client import ServerClient


@dataclass(frozen=True)
class Decode:
    """Passes of forced length.

    Attributes:
        batch: requests at once.
        prompt_tokens, max_new_tokens: of each.
        repeats: pairs of passes.
    """

    batch: int = 8
    prompt_tokens: int = 64
    max_new_tokens: int = 128
    repeats: int = 3


def is_of(document: Any, decode: Decode, mask: ExpertMask | None, label: str) -> bool:
    """Whether a document that lies there is what `decode_beside` would measure, on whatever device."""
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("error") or not document.get("results"):
        return False
    asked, side = document.get("settings") or {}, (document.get("sides") or {}).get("b") or {}
    wanted = {name: getattr(decode, name) for name in ("prompt_tokens", "max_new_tokens", "repeats")} | {"batches": [decode.batch]}
    served = side.get("softprune") or {}
    same = {name: asked.get(name) for name in wanted} == wanted
    return same and side.get("name") == label and served.get("mask_hash") == (None if mask is None else mask.hash)


def decode_beside(base: ServerClient, server: ServerClient, mask: ExpertMask | None, label: str, decode: Decode) -> dict[str, Any]:
    """Measure a mask against no mask on the first server.

    Args:
        base: the first server.
        server: the one that the mask is put in force on; may be the first.
        mask: None for none, on another server than the first.
        label: of the mask.
        decode: how.

    Returns:
        A document of `softprune bench compare`, B being the mask, without what single streams took.

    Raises:
        SoftpruneError: as `softprune.bench.compare.compare`, or someone else switched a mask meanwhile.
    """
    workload, names = Workload(decode.prompt_tokens, decode.max_new_tokens), (BASE_NAME, label)
    options: dict[str, Any] = {"repeats": decode.repeats, "engine_key": base.engine_key}
    if server is base:
        found = compare(Masks(base.url, None, mask, names), workload, [decode.batch], client=base, **options)
    else:
        base.switch(None)
        server.switch(mask)
        found = compare(Urls(base.url, server.url, names, (base.key, server.key)), workload, [decode.batch], **options)
        served = [found["sides"][side]["softprune"]["mask_hash"] for side in "ab"]
        if served != (expected := [None, mask and mask.hash]):
            raise SoftpruneError(f"{label}: found masks {served} when decoding began; expected {expected}: someone else switched")
    for row in found["results"]:
        for side in ("a", "b"):
            for one in row[side]["repeats"]:
                del one["streams"]
    return found


BASE_NAME = "unmasked"
