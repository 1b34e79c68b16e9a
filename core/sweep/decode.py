"""Decode speed of a mask beside the base's, measured in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from softprune.bench.compare import Masks, Urls, compare
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
        found = compare(Masks(base.url, None, mask, names), workload, [decode.batch], key=base.key, **options)
    else:
        epochs = [base.switch(None)["epoch"], server.switch(mask)["epoch"]]
        found = compare(Urls(base.url, server.url, names, (base.key, server.key)), workload, [decode.batch], **options)
        after = [client.status()["mask_epoch"] for client in (base, server)]
        if after != epochs:
            raise SoftpruneError(f"{label}: found mask epochs {after} after decoding; expected {epochs}: someone else switched a mask")
    for row in found["results"]:
        for side in ("a", "b"):
            for one in row[side]["repeats"]:
                del one["streams"]
    return found


BASE_NAME = "unmasked"
