"""Where a name that is gone may have gone: the same name elsewhere in the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile

from tests.contract.source import Package

SHOWN = 5


def moved(package: Package, near: str, path: str) -> str:
    """Where else a name is defined, as text for a message.

    Args:
        package: where to look.
        near: the module that it was in; those that share most of its name come first.
        path: "Class.method": places with both names, else all with the last one.
    """
    *owners, last = path.split(".")
    text = re.compile(rf"^\s*(?:(?:async\s+)?def|class)\s+{last}\b|^\s*{last}\s*[:=]|^\s*self\.{last}\s*[:=]", re.MULTILINE)
    places: list[str] = []
    for module, source in package.sources.items():
        if last in source and text.search(source):
            with suppress(SyntaxError):  # a template, or written for a newer Python
                places += [f"{module}:{found}" for found in _definitions(ast.parse(source), last, "")]
    same = [place for place in places if owners and place.endswith(f":{path}")]
    places = list(dict.fromkeys(same or places))
    places.sort(key=lambda place: -_shared(near, place.partition(":")[0]))
    if not places:
        return f"nothing in {package.name} is named {last!r}"
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"perhaps moved to {', '.join(places[:SHOWN])}{more}"


def _definitions(node: ast.AST, name: str, owner: str) -> Iterator[str]:
    """Paths of functions, classes, fields and assignments of a name, in modules, classes, and as attributes of self."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name == name:
                yield owner + name
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, name, f"{owner}{child.name}.")
            elif owner and any(_is_own(inner, name) for inner in ast.walk(child)):
                yield owner + name
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                yield owner + name
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child, name, owner)


def _is_own(node: ast.AST, name: str) -> bool:
    if not isinstance(node, ast.Attribute) or node.attr != name or not isinstance(node.ctx, ast.Store):
        return False
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def _shared(one: str, other: str) -> int:
    """How many leading parts two module names share."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
