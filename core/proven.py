"""Proven settings: how an extension's lists of what masks were seen to work with turn into refusals.

Modes are refused by name. Platforms, MoE backends and whatever selects experts are those that were
proven, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from softprune.errors import RefusedError
from softprune.seams import engine

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


def refusal(name: str, package: str) -> RefusedError:
    """The error for a setting that nobody has proven."""
    return RefusedError(
        f"{name} is not proven together with an expert mask in {engine(package)}; "
        "softprune refuses to start. Leave it out, or leave the softprune flags out."
    )


def only(backends: set[str]) -> str:
    """The MoE backend of all layers.

    Raises:
        RefusedError: they have several.
    """
    if len(backends) != 1:
        raise RefusedError(f"MoE backends: found {sorted(backends)}; expected one for all layers")
    return backends.pop()


def undoing(name: str) -> str:
    """Why a call to a masked engine is refused."""
    return f"{name} is refused while softprune masks this engine's routers: it would undo or copy the mask"


def check_modes(modes: Iterable[Mode], read: Callable[[str], Any], package: str) -> None:
    """Refuse a mode that masks are not proven with.

    Args:
        modes: those to look at.
        read: value at a mode's path; raises SeamError if this version has none.
        package: the engine's.

    Raises:
        RefusedError: names the flag, and what was found.
    """
    for mode in modes:
        value = read(mode.path)
        if not mode.is_off(value):
            shown = "set" if isinstance(value, (dict, list)) or hasattr(value, "__dict__") else value
            raise refusal(f"{mode.flag} ({shown})", package)


def check_backend(
    platform: str, architecture: str, backend: str, top_k: int, *, proven: Mapping[Backend, str], power_of_two: Iterable[str], flag: str,
    package: str,
) -> None:  # fmt: skip
    """Refuse an MoE backend that masks are not proven with, or a top_k that its kernel cannot take.

    Args:
        platform: the engine's name for the kind of device.
        architecture: the model's.
        backend: the one in use, as `routers.backend_of` names it.
        top_k: experts per token.
        proven: backend -> what proves it.
        power_of_two: those (third element) whose routing kernel takes a top_k that is a power of two only.
        flag: the engine's flag that chooses a backend.
        package: the engine's.

    Raises:
        RefusedError: not proven, or top_k is not a power of two where it has to be.
    """
    if (platform, architecture, backend) not in proven:
        others = [name for where, which, name in proven if (where, which) == (platform, architecture)]
        raise RefusedError(
            f"MoE backend {backend} for {architecture} on {platform} is not proven with an expert mask in {engine(package)}; "
            f"proven there: {', '.join(others) or 'none'}. {flag} chooses."
        )
    if backend in power_of_two and top_k & (top_k - 1):
        raise RefusedError(f"top_k {top_k}: MoE backend {backend} takes powers of two only (1, 2, 4, ...)")
