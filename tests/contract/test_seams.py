"""Claim: the newest SGLang and vLLM still have every place that softprune hooks into or reads.

`CONTRACT_VLLM=0.26.0 CONTRACT_SGLANG=0.5.17 make contract` asks other versions.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from softprune.seams import ENGINES, Seam
from softprune.sglang_ext import seams as sglang_seams
from tests.contract import static, uses
from tests.contract.fetch import fetch
from tests.contract.moved import moved
from tests.contract.source import Function, Package

VLLM_CONFIG = "vllm.config:VllmConfig"
SERVER_ARGS = "sglang.srt.server_args:ServerArgs"
SERVER_ARGS_FIELDS = "sglang.srt.arg_groups.fields"
"""Folder of the namespaces that newer versions build ServerArgs of."""


@functools.cache
def fetched(engine: str) -> tuple[str, Package] | RuntimeError:
    """Kept also where it fails, so that a network that is down is waited for once and not by every test."""
    try:
        wheel = fetch(engine)
    except RuntimeError as error:
        return error
    return f"{ENGINES[engine]} {wheel.version}", Package(wheel.folder)


def unpacked(engine: str) -> tuple[str, Package]:
    """The engine's name and version, for messages, and its sources."""
    found = fetched(engine)
    if isinstance(found, RuntimeError):
        pytest.fail(str(found), pytrace=False)
    return found


@contextmanager
def reported(engine: str, what: str) -> Iterator[Package]:
    """Turns what is missing into a failure of one line, under its name."""
    version, package = unpacked(engine)
    problem = None
    try:
        yield package
    except static.MissingError as missing:
        problem = f"{version}: {what}: {missing}"
    if problem:
        pytest.fail(problem, pytrace=False)


def per_engine(table: dict[str, list[Any]], name: Callable[[Any], str]) -> list[Any]:
    """Test parameters (engine, entry)."""
    return [pytest.param(engine, entry, id=f"{engine}-{name(entry)}") for engine, entries in table.items() for entry in entries]


@pytest.mark.parametrize(("engine", "seam"), per_engine(uses.SEAMS, lambda seam: seam.name))
def test_seam(engine: str, seam: Seam) -> None:
    with reported(engine, f"seam {seam.name}") as package:
        try:
            static.check(package, seam.target, seam.parameters)
        except static.MissingError:
            if seam in uses.OPTIONAL_SEAMS:
                pytest.skip(f"not in {unpacked(engine)[0]}")
            raise


@pytest.mark.parametrize(("engine", "target"), per_engine(uses.IMPORTS, str))
def test_import(engine: str, target: str) -> None:
    with reported(engine, "import") as package:
        static.find(package, target)


@pytest.mark.parametrize(("engine", "site"), per_engine(uses.BLOCK_ATTRIBUTES, lambda site: f"{site[0].name}.{site[1]}"))
def test_router_site(engine: str, site: tuple[Seam, str]) -> None:
    block, name = site
    with reported(engine, f"MoE block {block.name}") as package:
        static.check_attribute(package, block.target, name)


@pytest.mark.parametrize("path", uses.CONFIG_PATHS)
def test_vllm_mode(path: str) -> None:
    with reported("vllm", f"configuration {path}") as package:
        static.check_attribute(package, VLLM_CONFIG, path)


@pytest.mark.parametrize("name", uses.SETTINGS)
def test_sglang_setting(name: str) -> None:
    with reported("sglang", f"setting {name}") as package:
        if name not in settings(package):
            raise static.MissingError(f"{SERVER_ARGS} has no {name!r}; {moved(package, SERVER_ARGS.partition(':')[0], name)}")


def test_sglang_settings_are_read_as_resolved() -> None:
    """Without the view, softprune would read what the user typed and not what SGLang made of it."""
    with reported("sglang", "resolved settings") as package:
        if package.module(SERVER_ARGS_FIELDS) is not None:
            static.find(package, uses.RESOLVING_VIEW)


@pytest.mark.parametrize(("engine", "name"), per_engine(uses.REQUEST_FIELDS, str))
def test_request(engine: str, name: str) -> None:
    with reported(engine, f"request's {name}") as package:
        static.check_attribute(package, uses.REQUESTS[engine].target, name)


@functools.cache
def constants(engine: str) -> str:
    """All files that speak of metrics' names, as they are written."""
    texts = (file.read_text(errors="replace") for _, file in unpacked(engine)[1].files())
    return "\n".join(text for text in texts if f'"{engine}:' in text)


@pytest.mark.parametrize(("engine", "name"), per_engine(uses.METRICS, str))
def test_metric(engine: str, name: str) -> None:
    """Prometheus adds _total to a counter's name that does not end so."""
    if not any(f'"{one}"' in constants(engine) for one in (name, name.removesuffix("_total"))):
        pytest.fail(f"{unpacked(engine)[0]}: no metric {name}", pytrace=False)


@pytest.mark.parametrize("seam", [*sglang_seams.WEIGHT_UPDATES.values(), sglang_seams.BEGIN_WEIGHT_UPDATE], ids=lambda seam: seam.name)
def test_sglang_weight_update_can_be_answered(seam: Seam) -> None:
    """`sglang_ext.seams.answer_to` finds the answer's class by the request's name."""
    with reported("sglang", f"answer to {seam.name}") as package:
        try:
            (found,) = static.find(package, seam.target)
        except static.MissingError:
            pytest.skip("test_seam reports the call")
        assert isinstance(found.node, Function)
        annotation = {argument.arg: argument.annotation for argument in found.node.args.args}["recv_req"]
        request = ast.unparse(annotation) if annotation else "no annotation"
        assert request.endswith("ReqInput"), request
        static.check(package, f"sglang.srt.managers.io_struct:{request.removesuffix('Input')}Output", ("success", "message"))


@pytest.mark.parametrize("engine", uses.KNOWN_CALLS)
def test_no_new_call_can_change_weights_unseen(engine: str) -> None:
    """A public method that softprune has never looked at might undo a mask."""
    target, known = uses.KNOWN_CALLS[engine]
    with reported(engine, f"public methods of {target}") as package:
        (found,) = static.find(package, target)
        public = {
            node.name for one in static.classes(package, found) for node in static.class_of(one).body if isinstance(node, Function)
        }  # fmt: skip
        new = sorted(name for name in public if not name.startswith("_") and name not in known)
        if new:
            raise static.MissingError(f"new: {', '.join(new)}; decide whether a masked engine must refuse them")


@functools.cache
def settings(package: Package) -> set[str]:
    """Fields of ServerArgs, wherever this version declares them."""
    found = {name for one in static.find(package, SERVER_ARGS) for name in static.fields(package, one)}
    for name, _ in package.files():
        module = package.module(name) if name.startswith(f"{SERVER_ARGS_FIELDS}.") else None
        for nodes in module.bindings.values() if module else ():
            for node in nodes:
                if isinstance(node, ast.ClassDef) and any(ast.unparse(line).startswith("_NS_PATH =") for line in node.body):
                    assert module is not None
                    found |= set(static.fields(package, static.Found(module, node)))
    return found
