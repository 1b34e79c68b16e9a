"""Near-duplicates: texts that share most of their word 5-grams, found by MinHash and locality-sensitive hashing (datasketch)."""

from __future__ import annotations

import re
import zlib

from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]

_THRESHOLD = 0.5
_EMPTY = MinHash(num_perm=64, seed=1, hashfunc=zlib.crc32)


class NearDuplicates:
    """Remembers texts, and knows which new ones are near one of them (estimated Jaccard similarity of at least 0.5)."""

    def __init__(self) -> None:
        self._index = MinHashLSH(threshold=_THRESHOLD, num_perm=len(_EMPTY))
        self._size = 0

    def is_new(self, text: str) -> bool:
        """Whether the text is near none so far; if so it is remembered."""
        words = re.findall(r"\w+", text.lower())
        shingles = {" ".join(words[start : start + 5]).encode() for start in range(max(1, len(words) - 4))}
        # Drawing the permutations anew for every text would take most of the time.
        sketch = _EMPTY.copy()
        # A set's order depends on the process; a sketch's minimum does not.
        sketch.update_batch(list(shingles))
        if self._index.query(sketch):
            return False
        self._index.insert(self._size, sketch)
        self._size += 1
        return True
