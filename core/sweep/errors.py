"""Errors of sweeps."""

from softprune.errors import InputError


class SweepError(InputError):
    """A sweep that cannot be made, or goes on from another."""
