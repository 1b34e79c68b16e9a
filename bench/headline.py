"""The only writer of `headline.json`: one number for each measured claim, with the raw file that it came from."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from softprune.errors import InputError, shortened
from softprune.files import write_whole

NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
"""A figure's name."""
_FIELDS = {"value", "unit", "raw", "date"}


class Figure(TypedDict):
    """One measured claim.

    Attributes:
        value, unit: the number, and what it counts ("ratio", "ms", "MiB", …).
        raw: file with all samples, relative to the folder of headline.json.
        date: UTC date of the entry, ISO.
    """

    value: float
    unit: str
    raw: str
    date: str


def record(path: Path, name: str, value: float, unit: str, raw: str) -> None:
    """Add or replace one figure, with today's UTC date; makes the file if there is none. One that is there already keeps its date.

    Raises:
        InputError: a part is not as `Figure` says, `raw` is not there, or the file is not valid. The file stays as it was.
    """
    figures = read(path) if path.exists() else {}
    entry = {"value": value, "unit": unit, "raw": raw}
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    if name in figures and {**figures[name], **entry} == figures[name]:
        date = figures[name]["date"]
    figures[name] = _checked(path, name, {**entry, "date": date})
    write_whole(path, json.dumps(dict(sorted(figures.items())), indent=1) + "\n")


def read(path: Path) -> dict[str, Figure]:
    """All figures, by name.

    Raises:
        InputError: the file cannot be read, or an entry is not as `Figure` says, or its raw file is missing.
    """
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise InputError(str(path), "", error.strerror or str(error), "a readable file") from None
    except ValueError as error:
        raise InputError(str(path), "", f"no JSON ({error})", "a JSON object of figures") from None
    if not isinstance(document, dict):
        raise InputError(str(path), "", shortened(document), "a JSON object of figures")
    return {name: _checked(path, name, entry) for name, entry in document.items()}


def _checked(path: Path, name: str, entry: Any) -> Figure:
    file = str(path)
    if not NAME.fullmatch(name):
        raise InputError(file, shortened(name), "this name", "parts of a-z, 0-9 and _, with dots between, e.g. sglang.mask.switch_ms")
    if not isinstance(entry, Mapping) or set(entry) != _FIELDS:
        raise InputError(file, name, shortened(entry), f"an object of {', '.join(sorted(_FIELDS))}")
    value, unit, raw, date = entry["value"], entry["unit"], entry["raw"], entry["date"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(file, f"{name}.value", shortened(value), "a finite number")
    if not isinstance(unit, str) or not unit:
        raise InputError(file, f"{name}.unit", shortened(unit), "a unit")
    if not isinstance(raw, str) or not raw or PurePosixPath(raw).is_absolute() or ".." in PurePosixPath(raw).parts:
        raise InputError(file, f"{name}.raw", shortened(raw), "a path relative to the file's own folder, and inside it")
    if not (path.parent / raw).is_file():
        raise InputError(file, f"{name}.raw", f"no file {raw}", f"a file beside {path.name}")
    try:
        datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        raise InputError(file, f"{name}.date", shortened(date), "a date such as 2025-01-31") from None
    return Figure(value=value, unit=unit, raw=raw, date=date)
