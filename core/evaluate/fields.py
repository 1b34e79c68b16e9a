"""Taking values out of decoded JSON, one rule a call; what breaks it is named by file and field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from softprune.errors import InputError, shortened

_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


class Fields:
    """Of one document; every method raises `error` where its rule is broken.

    Args:
        source: the file's name.
        error: what to raise.
    """

    def __init__(self, source: str, error: type[InputError]) -> None:
        self.source, self.error = source, error

    def get(self, of: Mapping[str, Any], name: str, at: str, kind: type) -> Any:
        """The value of a key that has to be there, of one of the kinds of JSON; `at` is where `of` stands, "" for the top."""
        field = f"{at}.{name}" if at else name
        if name not in of:
            self.fail(field, "nothing", _KINDS[kind])
        return self.typed(of[name], field, kind)

    def typed(self, value: Any, field: str, kind: type) -> Any:
        """The value itself, if it is of the kind."""
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fail(field, shortened(value), _KINDS[kind])
        return value

    def number(self, of: Mapping[str, Any], name: str, at: str) -> float:
        """A finite number."""
        if name not in of:
            self.fail(f"{at}.{name}", "nothing", "a finite number")
        if type(value := of[name]) not in (int, float) or not math.isfinite(value):
            self.fail(f"{at}.{name}", shortened(value), "a finite number")
        return float(value)

    def floats(self, of: Mapping[str, Any], name: str, at: str, length: int) -> NDArray[np.float64]:
        """Finite numbers, [length]."""
        values: Sequence[Any] = self.get(of, name, at, list)
        field, expected = f"{at}.{name}", f"{length} finite numbers"
        if len(values) != length:
            self.fail(field, f"{len(values)} values", expected)
        if any(type(value) not in (int, float) for value in values):
            self.fail(field, "values that are no numbers", expected)
        try:
            array = np.asarray(values, np.float64)
        except OverflowError:
            self.fail(field, "a number that is too large", expected)
        if not np.isfinite(array).all():
            self.fail(field, "NaN or infinity", expected)
        return array

    def integers(self, of: Mapping[str, Any], name: str, at: str, length: int) -> NDArray[np.int64]:
        """Whole numbers below 2**53, none negative, [length]."""
        array = self.floats(of, name, at, length)
        if ((array < 0) | (array >= 2.0**53) | (array != np.floor(array))).any():
            self.fail(f"{at}.{name}", "negative numbers, fractions, or numbers of 2**53 and more", f"{length} counts")
        return array.astype(np.int64)

    def fail(self, field: str, found: str, expected: str) -> NoReturn:
        """Raise."""
        raise self.error(self.source, field, found, expected)
