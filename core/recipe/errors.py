"""What can be wrong with a recipe or a lockfile."""

from __future__ import annotations

from softprune.errors import InputError


class RecipeError(InputError):
    """A recipe that cannot be read or run, or a run that its lockfile does not allow."""
