"""What can be wrong with a statistics file."""

from __future__ import annotations

from softprune.errors import InputError


class StatisticsError(InputError):
    """A statistics file that cannot be used, or that cannot be added to another."""
