"""Reading YAML files that people give: bounded in size and nesting, no objects, no key twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from softprune.errors import InputError

MAX_BYTES = 64_000_000
"""Largest file that is read (64 MB, decimal)."""
_MAX_DEPTH = 40
# What a line begins with bounds how deep blocks can be nested; flow collections are counted.
_DEEP_LINE = re.compile(rb"^[ \t?:-]{%d}" % (2 * _MAX_DEPTH), re.MULTILINE)


class _Loader(yaml.CSafeLoader):
    """libyaml's loader, ten times as quick as the one in Python; it crashes on deep nesting, which is refused before."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} twice in one mapping", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return dict(super().construct_mapping(node, deep))


def read_yaml(path: str | Path, expected: str, error: type[InputError]) -> Any:
    """Decode a YAML file.

    Args:
        path: the file.
        expected: what it should have been, for errors.
        error: what to raise.

    Raises:
        InputError: missing, too large, no valid YAML, nested too deep, or a key given twice.
    """
    source = str(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise error(source, "", problem.strerror or str(problem), expected) from None
    if len(data) > MAX_BYTES:
        raise error(source, "", f"over {MAX_BYTES // 1_000_000} MB", f"at most {MAX_BYTES // 1_000_000} MB")
    if _DEEP_LINE.search(data) or _flow_depth(data) > _MAX_DEPTH:
        raise error(source, "", "YAML nested too deep", expected)
    try:
        return yaml.load(data, Loader=_Loader)
    except yaml.MarkedYAMLError as problem:
        line = f" in line {problem.problem_mark.line + 1}" if problem.problem_mark else ""
        raise error(source, "", f"no valid YAML ({problem.problem}{line})", expected) from None
    except (yaml.YAMLError, ValueError) as problem:
        raise error(source, "", f"no valid YAML ({str(problem).splitlines()[0]})", expected) from None


def _flow_depth(data: bytes) -> int:
    depth = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", data):
        depth = depth + 1 if bracket in b"[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest
