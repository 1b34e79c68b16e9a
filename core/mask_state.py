"""The file that keeps a live mask in force across a restart (`--expert-mask-state`).

    {"format": "softprune.mask-state", "version": 1, "top_k": 4, "mask": {an expert mask} or null}

It is written with every live switch. Where it exists at start, it decides, and not `--expert-mask`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final, NamedTuple

from softprune.errors import MaskError, shortened
from softprune.files import written_after
from softprune.mask import ExpertMask, read_json

FORMAT: Final = "softprune.mask-state"
VERSION: Final = 1


class MaskState(NamedTuple):
    """What was last in force.

    Attributes:
        mask: None if there was none.
        top_k: experts per token that the server ran with; None in a file that somebody wrote without.
    """

    mask: ExpertMask | None
    top_k: int | None


def read_state(path: str) -> MaskState:
    """What a state file keeps.

    Raises:
        MaskError: the file cannot be read, or is not such a file.
    """
    data = read_json(path)
    found = (data.get("format"), data.get("version"), "mask" in data) if isinstance(data, dict) else type(data).__name__
    if found != (FORMAT, VERSION, True):
        raise MaskError(path, "", shortened(found), f'an object with "format": "{FORMAT}", "version": {VERSION} and "mask"')
    top_k = data.get("top_k")
    if not (top_k is None or (type(top_k) is int and top_k > 0)):
        raise MaskError(path, "top_k", shortened(top_k), "a number of experts, or null")
    return MaskState(None if data["mask"] is None else ExpertMask.parse(data["mask"], path), top_k)


def kept_after(path: str | None, mask: ExpertMask | None, top_k: int) -> AbstractContextManager[None]:
    """Keep a mask once the block, in which it is put in force, has ended well.

    Args:
        path: in a folder that exists; None keeps nothing.
        mask: None for no mask.
        top_k: that the server runs with.

    Raises:
        OSError: the file cannot be written; the block does not run.
    """
    if path is None:
        return nullcontext()
    text = "null" if mask is None else mask.dump().strip()
    return written_after(Path(path), f'{{"format": "{FORMAT}", "version": {VERSION}, "top_k": {top_k},\n"mask": {text}}}\n')
