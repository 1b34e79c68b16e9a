"""Proven settings: how an extension's lists of what masks were seen to work with turn into refusals.

Modes are refused by name. Platforms, MoE backends and whatever selects experts are those that were
proven, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from softprune.errors import RefusedError

Backend = tuple[str, str, str]
"""(platform, architecture, how experts are stored / MoE backend), e.g. ("cuda", "GptOssForCausalLM", "mxfp4/TRITON")."""


@dataclass(frozen=True)
class Mode:
    """A way to run an engine that a mask has not been proven with.

    Attributes:
        flag: what a user would have typed.
        path: where the engine's configuration says so.
        is_off: whether a value means that the mode is not in use.
    """

    flag: str
    path: str
    is_off: Callable[[Any], bool]


def falsy(value: Any) -> bool:
    """Off if not set."""
    return not value


def one(value: Any) -> bool:
    """Off if it is the number 1."""
    return bool(value == 1)


def among(*values: Any) -> Callable[[Any], bool]:
    """Off if it is one of these."""
    return lambda value: value in values


def refusal(name: str, engine: str) -> RefusedError:
    """The error for a setting that nobody has proven."""
    return RefusedError(
        f"{name} is not proven together with an expert mask in {engine}; "
        "softprune refuses to start. Leave it out, or leave the softprune flags out."
    )


def undoing(name: str) -> str:
    """Why a call to a masked engine is refused."""
    return f"{name} is refused while softprune masks this engine's routers: it would undo or copy the mask"


def check_modes(modes: Iterable[Mode], read: Callable[[str], Any], engine: str) -> None:
    """Refuse a mode that masks are not proven with.

    Args:
        modes: those to look at.
        read: value at a mode's path; raises SeamError if this version has none.
        engine: name and version, for the message.

    Raises:
        RefusedError: names the flag, and what was found.
    """
    for mode in modes:
        value = read(mode.path)
        if not mode.is_off(value):
            shown = "set" if isinstance(value, (dict, list)) or hasattr(value, "__dict__") else value
            raise refusal(f"{mode.flag} ({shown})", engine)


def check_backend(proven: Mapping[Backend, str], found: Backend, power_of_two: Iterable[str], top_k: int, flag: str, engine: str) -> None:
    """Refuse an MoE backend that masks are not proven with, or a top_k that its kernel cannot take.

    Args:
        proven: backend -> what proves it.
        found: the one in use.
        power_of_two: those (third element) whose routing kernel takes a top_k that is a power of two only.
        top_k: experts per token.
        flag: the engine's flag that chooses a backend.
        engine: name and version, for the message.

    Raises:
        RefusedError: not proven, or top_k is not a power of two where it has to be.
    """
    platform, architecture, backend = found
    if found not in proven:
        others = [name for where, which, name in proven if (where, which) == (platform, architecture)]
        raise RefusedError(
            f"MoE backend {backend} for {architecture} on {platform} is not proven with an expert mask in {engine}; "
            f"proven there: {', '.join(others) or 'none'}. {flag} chooses."
        )
    if backend in power_of_two and top_k & (top_k - 1):
        raise RefusedError(f"top_k {top_k}: MoE backend {backend} takes powers of two only (1, 2, 4, ...)")
