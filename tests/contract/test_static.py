"""Claim: `static` finds what an import would find, and reports by name what an import would not."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from softprune.errors import SeamError
from softprune.seams import Seam
from tests.contract import static, uses
from tests.contract.source import Package

FILES = {
    "__init__.py": "from .api import *\nfrom pkg.core import Worker as Main\n",
    "api.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.core import Config\nelse:\n    Config = None\n",
    "core.py": """
import torch
from dataclasses import dataclass, field
from typing import ClassVar, Literal
import pkg.parts as parts
from .parts import Base, decorate

@dataclass
class Config:
    depth: int
    parallel: "parts.Parallel | None" = None
    kind: Literal["a b"] = "a b"
    shared: ClassVar[int] = 1
    def __post_init__(self):
        self.derived = 1

class Worker(Base):
    _patched: set[str] = set()
    def __init__(self, config, *, rank=0):
        self.router = 1
    @decorate
    def load(self, path, /, strict=True): ...
    alias = Base.start

class External(torch.nn.Module): ...

try:
    from fast import run
except ImportError:
    def run(tokens): ...

def anything(**options): ...
anything2 = anything
Worker = decorate(Worker)
""",
    "parts/__init__.py": "from .deep import Base\nfrom . import deep\nclass Parallel:\n    size: int = 1\ndef decorate(x): return x\n",
    "parts/deep.py": "class Base:\n    def start(self, now): ...\n    def __init__(self, old): ...\n",
}


def package(root: Path, changes: dict[str, str | None] | None = None) -> Package:
    """The package above, with some files replaced, or left out where None."""
    for name, text in {**FILES, **(changes or {})}.items():
        if text is not None:
            file = root / "pkg" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return Package(root / "pkg")


@pytest.mark.parametrize(
    ("target", "parameters"),
    [
        ("pkg.core:Config", ("depth", "parallel")),  # fields of a dataclass
        ("pkg:Config", ("depth",)),  # through a star, under TYPE_CHECKING
        ("pkg:Main", ("config", "rank")),  # renamed, and wrapped by a decorator as a call
        ("pkg.core:Worker.load", ("path", "strict")),
        ("pkg.core:Worker.start", ("now",)),  # inherited, re-exported by a package's __init__
        ("pkg.core:Worker.alias", ("now",)),
        ("pkg.core:Worker._patched", ()),
        ("pkg.core:run", ("tokens",)),  # in a try
        ("pkg.core:anything2", ("whatever",)),
        ("pkg.parts:deep.Base.start", ("now",)),
        ("pkg.parts:Parallel", ("size",)),
    ],
)
def test_what_is_there_is_found(tmp_path: Path, target: str, parameters: tuple[str, ...]) -> None:
    static.check(package(tmp_path), target, parameters)


@pytest.mark.parametrize(
    ("target", "parameters", "message"),
    [
        ("pkg.core:Worker.load", ("file",), "takes no parameter 'file'; it takes path, strict"),
        ("pkg.core:Config", ("shared",), "takes no parameter 'shared'"),
        ("pkg.core:Worker", ("old",), "takes no parameter 'old'; it takes config, rank"),  # the base's, overridden
        ("pkg.core:External.forward", (), "has no 'forward'; nothing in pkg is named 'forward'"),
        ("pkg.core:Worker.router", (), "has no 'router'"),  # objects have it, the class does not
        ("pkg.core:Parallel", (), "has no 'Parallel'; perhaps moved to pkg.parts:Parallel"),
        ("pkg.nowhere:Base.start", (), "no module pkg.nowhere; perhaps moved to pkg.parts.deep:Base.start"),
    ],
)
def test_what_is_not_there_is_reported(tmp_path: Path, target: str, parameters: tuple[str, ...], message: str) -> None:
    with pytest.raises(static.MissingError) as missing:
        static.check(package(tmp_path), target, parameters)
    assert message in str(missing.value)


@pytest.mark.parametrize(
    ("file", "before", "after", "target", "parameters", "message"),
    [
        ("core.py", "def run(tokens)", "def go(tokens)", "pkg.core:run", ("tokens",), "takes no parameter 'tokens'"),
        ("core.py", "def load(self, path", "def load(self, file", "pkg.core:Worker.load", ("path",), "takes no parameter 'path'"),
        ("core.py", "def load(self, path", "def fetch(self, path", "pkg.core:Worker.load", (), "has no 'load'; nothing in pkg"),
        ("core.py", "    depth: int", "    width: int", "pkg.core:Config", ("depth",), "takes no parameter 'depth'"),
        ("parts/deep.py", "def start(self, now)", "def start(self, then)", "pkg.core:Worker.start", ("now",), "it takes then"),
        ("core.py", "class Worker(Base)", "class Worker", "pkg.core:Worker.start", (), "perhaps moved to pkg.parts.deep:Base.start"),
        ("parts/__init__.py", "from .deep import Base", "", "pkg.core:Worker.start", (), "perhaps moved to pkg.parts.deep:Base.start"),
    ],
)
def test_every_change_is_noticed(
    tmp_path: Path, file: str, before: str, after: str, target: str, parameters: tuple[str, ...], message: str
) -> None:
    static.check(package(tmp_path / "before"), target, parameters)
    assert before in FILES[file]
    changed = package(tmp_path / "after", {file: FILES[file].replace(before, after)})
    with pytest.raises(static.MissingError) as missing:
        static.check(changed, target, parameters)
    assert message in str(missing.value)


def test_a_moved_module_is_reported(tmp_path: Path) -> None:
    moved = package(tmp_path, {"core.py": None, "engine/core.py": FILES["core.py"].replace("from .parts", "from ..parts")})
    with pytest.raises(static.MissingError, match=r"no module pkg\.core; perhaps moved to pkg\.engine\.core:Worker\.load$"):
        static.check(moved, "pkg.core:Worker.load")


def test_the_nearest_places_come_first(tmp_path: Path) -> None:
    text = "class Gate:\n    def close(self): ...\n"
    many = package(tmp_path, {"a.py": text, "parts/z.py": text, "far/deep.py": text, "parts/unparsable.py": text + "}\n"})
    with pytest.raises(static.MissingError, match=r"perhaps moved to pkg\.parts\.z:Gate\.close, pkg\.a:Gate\.close, pkg\.far"):
        static.check(many, "pkg.parts.deep:Gate.close")


def test_imports_in_a_circle_end(tmp_path: Path) -> None:
    circle = package(tmp_path, {"a.py": "from .b import x\n", "b.py": "from .a import x\n"})
    with pytest.raises(static.MissingError, match="has no 'x'"):
        static.check(circle, "pkg.a:x")


@pytest.mark.parametrize("path", ["depth", "derived", "parallel.size"])
def test_attributes_of_objects_are_found(tmp_path: Path, path: str) -> None:
    static.check_attribute(package(tmp_path), "pkg.core:Config", path)


@pytest.mark.parametrize(
    ("target", "path", "message"),
    [
        ("pkg.core:Config", "parallel.rank", "Parallel has no 'rank', wanted as 'parallel.rank'"),
        ("pkg.core:Config", "parallels.size", "has no 'parallels'"),
        ("pkg.core:Config", "depth.size", "has no 'depth' of a type that can be followed"),
        ("pkg.core:Worker", "gate", "Worker has no 'gate'"),
    ],
)
def test_attributes_that_objects_have_not_are_reported(tmp_path: Path, target: str, path: str, message: str) -> None:
    with pytest.raises(static.MissingError) as missing:
        static.check_attribute(package(tmp_path), target, path)
    assert message in str(missing.value)


@pytest.fixture(scope="session")
def installed() -> Package:
    """The vLLM of this environment."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None, "no vLLM in this environment; `make setup` installs it"
    assert spec.submodule_search_locations
    return Package(Path(spec.submodule_search_locations[0]))


def holds(seam: Seam) -> bool:
    """What softprune itself says of a seam, which imports vLLM."""
    try:
        seam.resolve()
    except SeamError:
        return False
    return True


@pytest.mark.parametrize("seam", uses.SEAMS["vllm"], ids=lambda seam: seam.name)
def test_agrees_with_an_import(installed: Package, seam: Seam) -> None:
    module, _, path = seam.target.partition(":")
    variants = [
        seam,
        replace(seam, parameters=(*seam.parameters, "no_such_parameter")),
        replace(seam, target=seam.target + "_"),
        replace(seam, target=f"{module}_:{path}"),
        replace(seam, target=f"{module}:{path}.no_such_member"),
    ]
    for variant in variants:
        try:
            taken = [static.parameters_of(installed, one) for one in static.check(installed, variant.target, variant.parameters)]
            found = True
        except static.MissingError:
            found, taken = False, []
        if None in taken and "no_such_parameter" in variant.parameters:
            continue  # **kwargs take it; `Seam.resolve` wants every parameter by name
        assert found == holds(variant), variant
