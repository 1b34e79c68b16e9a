"""A package as it is written: its modules and the names that they bind, parsed and never imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Imported:
    """A name that a module takes from elsewhere.

    Attributes:
        module: absolute.
        name: in that module; None for the module itself.
    """

    module: str
    name: str | None


Function = ast.FunctionDef | ast.AsyncFunctionDef
Bound = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Module | Imported
"""What a name can stand for; `ast.Module` is a module itself."""


class Module:
    """One file.

    Attributes:
        name: absolute, with dots.
        tree: as parsed; empty for a folder without __init__.py.
    """

    def __init__(self, name: str, file: Path | None, is_package: bool) -> None:
        self.name, self._is_package = name, is_package
        self.tree = ast.parse(file.read_bytes()) if file else ast.Module([], [])

    @cached_property
    def bindings(self) -> dict[str, list[Bound]]:
        """Everything bound at module level; several where it depends on a condition."""
        return self.bound_in(self.tree.body)

    @cached_property
    def stars(self) -> list[str]:
        """Modules of `from … import *`."""
        imports = (node for node in self.tree.body if isinstance(node, ast.ImportFrom))
        return [self._absolute(node) for node in imports if node.names[0].name == "*"]

    def bound_in(self, body: Iterable[ast.stmt]) -> dict[str, list[Bound]]:
        """What a module's or a class's statements bind: a later one replaces an earlier one, unless it is conditional."""
        found: dict[str, list[Bound]] = {}
        for statement in body:
            if blocks := list(_blocks(statement)):
                for block in blocks:
                    for name, nodes in self.bound_in(block).items():
                        found.setdefault(name, []).extend(nodes)
                continue
            for name, node in self._binds(statement):
                # X = decorate(X) is still X.
                wraps = isinstance(node, ast.Assign) and any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node.value))
                found[name] = [*(found.get(name, []) if wraps else ()), node]
        return found

    def _binds(self, statement: ast.stmt) -> Iterator[tuple[str, Bound]]:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not any(last_name(decorator) == "overload" for decorator in statement.decorator_list):
                yield statement.name, statement
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                for node in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                    if isinstance(node, ast.Name):
                        yield node.id, statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                top = alias.name.partition(".")[0]
                yield alias.asname or top, Imported(alias.name if alias.asname else top, None)
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                yield alias.asname or alias.name, Imported(self._absolute(statement), alias.name)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - node.level + self._is_package]
        return ".".join([*parts, node.module] if node.module else parts)


class Package:
    """An unpacked package.

    Args:
        folder: the package's own folder; its name is the package's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self._modules: dict[str, Module | None] = {}

    def owns(self, module: str) -> bool:
        """Whether a module's name belongs to this package."""
        return module.partition(".")[0] == self.name

    def module(self, name: str) -> Module | None:
        """A module by its absolute name; None if there is none."""
        if name not in self._modules:
            self._modules[name] = self._read(name) if self.owns(name) else None
        return self._modules[name]

    def _read(self, name: str) -> Module | None:
        base = self.folder.joinpath(*name.split(".")[1:])
        if (base / "__init__.py").is_file():
            return Module(name, base / "__init__.py", is_package=True)
        if base != self.folder and (file := base.with_name(base.name + ".py")).is_file():
            return Module(name, file, is_package=False)
        return Module(name, None, is_package=True) if base.is_dir() else None

    @cached_property
    def sources(self) -> dict[str, str]:
        """Text of every module, by its name; read once, as names are looked for many times."""
        return {name: file.read_text(errors="replace") for name, file in self.files()}

    def files(self) -> Iterator[tuple[str, Path]]:
        """(module name, file) of every module."""
        for file in sorted(self.folder.rglob("*.py")):
            parts = [self.name, *file.relative_to(self.folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def last_name(node: ast.expr) -> str:
    """`dataclass` of `@dataclasses.dataclass(…)`; "" for anything without a name."""
    if isinstance(node, ast.Call | ast.Subscript):
        return last_name(node.func if isinstance(node, ast.Call) else node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """Bodies of `if`, `try` and `with`: what is bound there is bound outside."""
    if isinstance(statement, ast.If | ast.Try | ast.With):
        yield statement.body
    if isinstance(statement, ast.If | ast.Try):
        yield statement.orelse
    if isinstance(statement, ast.Try):
        yield from (handler.body for handler in statement.handlers)
        yield statement.finalbody
