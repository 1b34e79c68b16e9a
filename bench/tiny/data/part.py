"""What is counted and hashed of a part of a pack, as bench/tiny/data.json keeps it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from softprune.bench.tiny.data.pack_files import Row
from softprune.evaluate.harmony import completion_spans


@dataclass(frozen=True)
class Part:
    """Rows of one pack with their tokens.

    Attributes:
        tokens: uint16, rows' ids each followed by EOS.
        completion_tokens: how many of them count in a perplexity (metrics.md 1.2).
    """

    rows: Sequence[Row]
    tokens: npt.NDArray[np.uint16]
    completion_tokens: int

    def measures(self) -> dict[str, int | str]:
        """Sizes, and the hashes that a rebuild must reach."""
        return {
            "conversations": len(self.rows),
            "documents": len({document for row in self.rows for document in row.documents}),
            "characters": sum(len(row.text) for row in self.rows),
            "tokens": len(self.tokens),
            "completion_tokens": self.completion_tokens,
            "rows_sha256": rows_sha256(self.rows),
            "tokens_sha256": hashlib.sha256(self.tokens.astype("<u2").tobytes()).hexdigest(),
        }


def rows_sha256(rows: Sequence[Row]) -> str:
    """Hash of the texts in their order, each followed by a zero byte (metrics.md 1.1)."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.text.encode() + b"\0")
    return digest.hexdigest()


def num_completion_tokens(text: str, encoding: Encoding) -> int:
    """Tokens whose characters overlap what the assistant says (metrics.md 1.2)."""
    offsets = np.array(encoding.offsets)
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in completion_spans(text):
        inside |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    return int(inside.sum())
