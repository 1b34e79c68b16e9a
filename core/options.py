"""Options of several commands."""

from __future__ import annotations

from softprune.errors import InputError


def whole_numbers(option: str, text: str, example: str, separator: str = ",") -> list[int]:
    """Whole numbers with separators between them.

    Raises:
        InputError: something else.
    """
    try:
        return [int(part) for part in text.split(separator)]
    except ValueError:
        raise InputError(option, "", repr(text), f"whole numbers, e.g. {example}") from None
