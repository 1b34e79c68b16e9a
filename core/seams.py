"""A seam: one name inside an engine that softprune hooks into or reads, and the check that it is still there.

Each extension's `seams.py` lists its own. Known versions are those in which a seam was read or run; others are
let through as long as the check holds, since the checks at start decide, not a version number.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from softprune.errors import SeamError

ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
"""Package -> the engine's name, as messages show it."""


def engine(package: str) -> str:
    """Engine name and version, for messages."""
    return f"{ENGINES[package]} {importlib.import_module(package).__version__}"


@dataclass(frozen=True)
class Seam:
    """A name inside an engine.

    Attributes:
        name: what softprune calls it.
        target: "module:attribute.path".
        parameters: names that the callable has to accept.
    """

    name: str
    target: str
    parameters: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """The engine's package: "vllm" or "sglang"."""
        return self.target.partition(".")[0].partition(":")[0]

    @property
    def dotted(self) -> str:
        """The target as one dotted path."""
        return self.target.replace(":", ".")

    def resolve(self) -> Any:
        """The object behind the seam.

        Raises:
            SeamError: the module or an attribute is missing, or a parameter is.
        """
        module_name, _, path = self.target.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:  # an engine's module may fail in any way: a missing library, a failed assertion
            raise self.missing(f"cannot import {module_name} ({type(error).__name__}: {error})") from error
        for part in path.split("."):
            if not hasattr(found, part):
                raise self.missing(f"{self.target} has no {part!r}")
            found = getattr(found, part)
        accepted = inspect.signature(found).parameters if self.parameters else {}
        for parameter in self.parameters:
            if parameter not in accepted:
                raise self.missing(f"{self.target} takes no parameter {parameter!r}")
        return found

    def missing(self, detail: str) -> SeamError:
        """The error that says what is wrong with this seam."""
        return SeamError(self.name, engine(self.package), detail)


def check(seams: Iterable[Seam]) -> None:
    """See that every seam of a group holds.

    Raises:
        SeamError: the first that does not.
    """
    for seam in seams:
        seam.resolve()


def attribute(owner: Any, path: str, seam: str, package: str) -> Any:
    """A nested attribute of an engine's object.

    Args:
        owner: the object.
        path: names with dots between.
        seam: what softprune calls this place, for the message.
        package: the engine's package.

    Raises:
        SeamError: it does not exist.
    """
    found = owner
    for part in path.split("."):
        if not hasattr(found, part):
            raise SeamError(seam, engine(package), f"{type(found).__name__} has no {part!r}")
        found = getattr(found, part)
    return found
