"""What can be wrong with a ranking."""

from __future__ import annotations

from softprune.errors import InputError


class RankError(InputError):
    """A criterion that cannot be computed from what was given, or a scores file that cannot be used."""
