"""The statistics file: one safetensors file whose metadata holds the header as JSON.

Everything in it is a sum, so files add up (`softprune.stats.merge`); ratios are computed (`softprune.stats.figures`), never
stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from softprune.files import replaced_after
from softprune.stats import header_rules
from softprune.stats.errors import StatisticsError
from softprune.stats.header import FORMAT, Header
from softprune.stats.layout import SPECS, check_form, check_names, check_values, rounded, shapes

_DTYPES = {"I64": np.dtype(np.int64), "F64": np.dtype(np.float64)}
_A_FILE = "a statistics file"


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a file holds.

    Attributes:
        header: see `Header`.
        tensors: by name, int64 or float64, in the shapes of `layout.shapes(header)`.
        source: the file's name, for errors.
    """

    header: Header
    tensors: Mapping[str, NDArray[Any]]
    source: str = "statistics"

    @classmethod
    def of(cls, header: Header, tensors: Mapping[str, NDArray[Any]], source: str = "statistics") -> Statistics:
        """Statistics from raw sums of any integer or float dtype; sums are rounded to their quanta, tensors copied.

        Raises:
            StatisticsError: a rule of the header, a shape or a value is broken.
        """
        check_names(tensors, header, source)
        for name, values in tensors.items():
            if np.issubdtype(values.dtype, np.floating) and (SPECS[name].quantum is None or not np.isfinite(values).all()):
                found = f"dtype {values.dtype}" if SPECS[name].quantum is None else "NaN or infinity"
                raise StatisticsError(source, name, found, "integers" if SPECS[name].quantum is None else "finite sums")
        statistics = cls(header, {name: rounded(SPECS[name], values) for name, values in tensors.items()}, source)
        statistics.check()
        return statistics

    @classmethod
    def zeros(cls, header: Header, source: str = "statistics") -> Statistics:
        """Statistics of nothing, to be added to."""
        return cls(header, {name: np.zeros(shape, SPECS[name].dtype) for name, shape in shapes(header).items()}, source)

    def check(self) -> None:
        """Hold against every rule of header, shapes and values.

        Raises:
            StatisticsError: names the field.
        """
        header_rules.check(self.header, self.source)
        check_names(self.tensors, self.header, self.source)
        for name, values in self.tensors.items():
            check_form(name, values.dtype, values.shape, self.header, self.source)
        check_values(self.tensors, self.source)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A tensor by name.

        Raises:
            StatisticsError: it was not collected, or not read.
        """
        if name not in self.tensors:
            raise StatisticsError(self.source, name, f"none; collected were {', '.join(self.header.modes)}", f"the mode {SPECS[name].mode}")
        return self.tensors[name]

    def tag_index(self, tag: str) -> int:
        """Place of a tag on the tag axis.

        Raises:
            StatisticsError: there is no such tag.
        """
        if tag not in self.header.tags:
            raise StatisticsError(self.source, "tags", f"no tag {tag!r}", f"one of {', '.join(self.header.tags)}")
        return self.header.tags.index(tag)


def read(path: str | Path, only: Collection[str] | None = None) -> Statistics:
    """Read a file, every value checked.

    Args:
        path: the file.
        only: names of the tensors to load, as far as the file has them; None loads all. Names and shapes are checked for all.

    Raises:
        StatisticsError: missing, truncated, foreign, of another version, or breaking a rule.
    """
    with _opened(path) as (file, header):
        names = [name for name in file.keys() if only is None or name in only]  # noqa: SIM118 - not a dict
        tensors = {name: file.get_tensor(name) for name in names}
    check_values(tensors, str(path))
    return Statistics(header, tensors, str(path))


def read_by_tag(path: str | Path, header: Header) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
    """Read a file tag by tag, every value checked: (tag, tensors whose tag axis has this one entry).

    Needs memory for one tag; and since blocks of that size are used again, a fifth of the time of reading whole tensors (10 instead of
    47 ms for 38 MB of co-activation).

    Args:
        path: the file.
        header: what `read_header` found.

    Raises:
        StatisticsError: as `read`, or the header is no longer that one.
    """
    with _opened(path) as (file, found):
        if found != header:
            raise StatisticsError(str(path), "header", "another than a moment ago", "a file that nobody writes while it is read")
        views = {name: file.get_slice(name) for name in shapes(header)}
        for i, tag in enumerate(header.tags):
            tensors = {name: view[i : i + 1] for name, view in views.items()}
            check_values(tensors, str(path))
            yield tag, tensors


def read_header(path: str | Path) -> Header:
    """Read only the header; names, dtypes and shapes of the tensors are checked too.

    Raises:
        StatisticsError: as `read`, but for values.
    """
    with _opened(path) as (_, header):
        return header


def write(statistics: Statistics, path: str | Path) -> None:
    """Write a file; it appears whole or not at all, and equal statistics give equal bytes.

    Raises:
        StatisticsError: a rule is broken, or the file cannot be written (no such folder, no rights, a full disk).
    """
    statistics.check()
    path = Path(path)
    try:
        with replaced_after(path) as temporary:
            tensors, metadata = _parts(statistics)
            save_file(tensors, temporary, metadata)
    except OSError as error:
        raise StatisticsError(str(path), "", error.strerror or str(error), "a place that can be written") from None
    except SafetensorError as error:
        raise StatisticsError(str(path), "", f"a failed write ({error})", "a place that can be written") from None


def dump(statistics: Statistics) -> bytes:
    """The bytes that `write` would write.

    Raises:
        StatisticsError: a rule is broken.
    """
    statistics.check()
    return bytes(save(*_parts(statistics)))


def _parts(statistics: Statistics) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors and metadata, as safetensors takes them."""
    # One entry: with more, safetensors would write them in an order that changes.
    metadata = {FORMAT: statistics.header.dump()}
    return {name: np.ascontiguousarray(values) for name, values in statistics.tensors.items()}, metadata


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Header]]:
    source = str(path)
    try:
        # A folder would be opened, and fail without its name.
        with open(path, "rb"):
            pass
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(FORMAT)
            if text is None:
                raise StatisticsError(source, "metadata", f'no entry "{FORMAT}"', f"{_A_FILE}; other safetensors files are not")
            header = header_rules.parse(text, source)
            # Of a dtype that numpy lacks, the error still tells the name.
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            check_names(slices, header, source)
            for name, view in slices.items():
                check_form(name, _DTYPES.get(view.get_dtype(), view.get_dtype()), tuple(view.get_shape()), header, source)
            yield file, header
    except OSError as error:
        raise StatisticsError(source, "", error.strerror or str(error), f"{_A_FILE} that can be read") from None
    except SafetensorError as error:
        raise StatisticsError(source, "", f"no whole safetensors file ({error})", _A_FILE) from None
