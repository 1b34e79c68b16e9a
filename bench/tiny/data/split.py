"""Which documents are held out, and the seeds of everything random in the packs."""

from __future__ import annotations

import hashlib
import random

HELDOUT_PER_MILLE = 50
"""Share of the documents that is held out; for generated kinds, of the problems."""

SEED = 20261123


def fraction(text: str) -> int:
    """A number from 0 to 999 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(f"{SEED}/{text}".encode()).digest()[:8], "big") % 1000


def is_heldout(document: str) -> bool:
    """Whether everything that is made from this document goes to the held-out part."""
    return fraction(document) < HELDOUT_PER_MILLE


def rng_for(*names: object) -> random.Random:
    """A generator of its own for every purpose, the same in every process."""
    # A text seed is hashed with SHA-512 whatever PYTHONHASHSEED says.
    return random.Random("/".join(map(str, (SEED, *names))))
