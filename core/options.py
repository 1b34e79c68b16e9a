"""Options of several commands."""

from __future__ import annotations

from softprune.errors import InputError


def whole_numbers(option: str, text: str) -> list[int]:
    """Whole numbers with commas between them.

    Raises:
        InputError: something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(option, "", repr(text), "whole numbers with commas between them") from None
