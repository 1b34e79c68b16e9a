"""What can be wrong with an evaluation, and with the file of one."""

from __future__ import annotations

from softprune.errors import InputError, SoftpruneError


class EvaluationError(SoftpruneError):
    """An evaluation that would have to make a number up."""


class EvaluationFileError(InputError):
    """An evaluation file that cannot be used."""


class GatesError(InputError):
    """A file of thresholds that cannot be used."""
