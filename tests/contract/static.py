"""Whether an engine's sources still have what softprune uses, without importing them: a wheel without its dependencies cannot be.

Base classes and imports are followed inside the package. Method resolution order is taken depth first.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from tests.contract.moved import moved
from tests.contract.source import Bound, Function, Imported, Module, Package, last_name

MAKES_INIT = ("dataclass", "config")
"""Decorators that make a class's fields its parameters; `config` is vLLM's."""


class MissingError(LookupError):
    """Something is not where it was; the message says what, and where it may be now."""


@dataclass(frozen=True)
class Found:
    """Something in the package: what it is, and the module whose names it speaks in."""

    module: Module
    node: Bound


def check(package: Package, target: str, parameters: Iterable[str] = ()) -> list[Found]:
    """What `Seam.resolve` checks in a running engine; several where it depends on a condition.

    Raises:
        MissingError: the module, an attribute or a parameter is not there.
    """
    found = find(package, target)
    taken = [parameters_of(package, one) for one in found]
    for parameter in parameters:
        if not any(names is None or parameter in names for names in taken):
            known = sorted({name for names in taken for name in names or ()} - {"self", "cls"})
            raise MissingError(f"{target} takes no parameter {parameter!r}; it takes {', '.join(known) or 'none that can be read'}")
    return found


def find(package: Package, target: str) -> list[Found]:
    """What "module:attribute.path" stands for.

    Raises:
        MissingError: it is not there.
    """
    module_name, _, path = target.partition(":")
    module = package.module(module_name)
    if module is None:
        raise MissingError(f"no module {module_name}; {moved(package, module_name, path)}")
    found = [Found(module, module.tree)]
    for part in path.split("."):
        found = [inner for outer in found for inner in members(package, outer, part)]
        if not found:
            raise MissingError(f"{target} has no {part!r}; {moved(package, module_name, path)}")
    return found


def lookup(package: Package, module: Module, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> list[Found]:
    """What a name stands for in a module; `seen` are the (module, name) on the way, since imports may go in circles."""
    if (module.name, name) in seen:
        return []
    seen |= {(module.name, name)}
    found = [one for bound in module.bindings.get(name, ()) for one in _follow(package, module, bound, seen)]
    for star in module.stars if not found else ():
        if other := package.module(star):
            found += lookup(package, other, name, seen)
    if not found and (inner := package.module(f"{module.name}.{name}")):
        found = [Found(inner, inner.tree)]
    return found


def _follow(package: Package, module: Module, bound: Bound, seen: frozenset[tuple[str, str]]) -> list[Found]:
    if isinstance(bound, Imported) and package.owns(bound.module):
        source = package.module(bound.module)
        if source is None:
            return []
        return [Found(source, source.tree)] if bound.name is None else lookup(package, source, bound.name, seen)
    if isinstance(bound, ast.Assign) and (aliased := named(package, module, bound.value, seen)):
        return aliased
    return [Found(module, bound)]


def named(package: Package, module: Module, node: ast.expr, seen: frozenset[tuple[str, str]] = frozenset()) -> list[Found]:
    """What an expression like `Base`, `module.Base` or `Base[T]` stands for; [] for any other."""
    if isinstance(node, ast.Subscript):
        return named(package, module, node.value, seen)
    if isinstance(node, ast.Name):
        return lookup(package, module, node.id, seen)
    if isinstance(node, ast.Attribute):
        return [inner for outer in named(package, module, node.value, seen) for inner in members(package, outer, node.attr)]
    return []


def members(package: Package, owner: Found, name: str) -> list[Found]:
    """An attribute of a module or a class; of a class also inherited ones."""
    if isinstance(owner.node, ast.Module):
        return lookup(package, owner.module, name)
    for one in classes(package, owner):
        if bound := one.module.bound_in(class_of(one).body).get(name):
            return [inner for node in bound for inner in _follow(package, one.module, node, frozenset())]
    return []


def classes(package: Package, found: Found) -> list[Found]:
    """A class and its bases inside the package, nearest first; [] if it is no class."""
    order: list[Found] = []

    def add(one: Found) -> None:
        if isinstance(one.node, ast.ClassDef) and one not in order:
            order.append(one)
            for base in one.node.bases:
                for inner in named(package, one.module, base):
                    add(inner)

    add(found)
    return order


def class_of(found: Found) -> ast.ClassDef:
    """The class statement behind one of `classes`."""
    assert isinstance(found.node, ast.ClassDef)
    return found.node


def parameters_of(package: Package, found: Found) -> set[str] | None:
    """Names that a callable accepts; None for all. Decorators are taken to keep them."""
    if isinstance(found.node, Function):
        arguments = found.node.args
        named_ones = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        return None if arguments.kwarg else named_ones
    for one in classes(package, found):
        inits = one.module.bound_in(class_of(one).body).get("__init__", [])
        if functions := [Found(one.module, node) for node in inits if isinstance(node, Function)]:
            return parameters_of(package, functions[0])
        if any(last_name(decorator) in MAKES_INIT for decorator in class_of(one).decorator_list):
            break
    return set(fields(package, found))


def fields(package: Package, found: Found) -> dict[str, Found]:
    """Annotated fields of a dataclass, msgspec struct or pydantic model, with those of its bases."""
    own: dict[str, Found] = {}
    for one in classes(package, found):
        for name, nodes in one.module.bound_in(class_of(one).body).items():
            for node in nodes:
                if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                    own.setdefault(name, Found(one.module, node))
    return own


def has_attribute(package: Package, found: Found, name: str) -> bool:
    """Whether objects of a class have an attribute: a member, a field, or one that `__init__` or `__post_init__` sets."""
    return bool(members(package, found, name)) or any(
        name in _set_by(statement)
        for one in classes(package, found)
        for statement in class_of(one).body
        if isinstance(statement, Function) and statement.name in ("__init__", "__post_init__")
    )


def _set_by(function: ast.AST) -> set[str]:
    """Attributes that a method assigns to self."""
    nodes = (node for node in ast.walk(function) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "self"}


def check_attribute(package: Package, target: str, path: str) -> None:
    """Follow a path of attributes through objects of a class, by the types that their fields are annotated with.

    Raises:
        MissingError: names the class that no longer has the next one.
    """
    module_name = target.partition(":")[0]
    found = find(package, target)
    *outer, last = path.split(".")
    for part in outer:
        annotated = [fields(package, one).get(part) for one in found]
        found = [inner for field in annotated if field for inner in _types(package, field)]
        if not found:
            raise MissingError(f"{target} has no {part!r} of a type that can be followed to {path!r}; {moved(package, module_name, part)}")
    if not any(has_attribute(package, one, last) for one in found):
        owners = [node.name for one in found if isinstance(node := one.node, ast.ClassDef)]
        raise MissingError(f"{', '.join(owners)} has no {last!r}, wanted as {path!r} of {target}; {moved(package, module_name, last)}")


def _types(package: Package, field: Found) -> Iterator[Found]:
    """Classes of the package that a field's annotation names, whatever stands around them."""
    assert isinstance(field.node, ast.AnnAssign)
    for node in _nodes(field.node.annotation):
        if isinstance(node, ast.Name | ast.Attribute):
            yield from (one for one in named(package, field.module, node) if isinstance(one.node, ast.ClassDef))


def _nodes(annotation: ast.expr) -> Iterator[ast.AST]:
    """All nodes of an annotation, also inside quotes."""
    for node in ast.walk(annotation):
        yield node
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            with suppress(SyntaxError):  # the text of a Literal, or of an Annotated's help
                yield from _nodes(ast.parse(node.value, mode="eval").body)
