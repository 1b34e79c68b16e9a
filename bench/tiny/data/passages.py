"""Passages: a few consecutive sentences of a document, cleaned of what would not read as prose, without near-duplicates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from softprune.bench.tiny.data.documents import Document

_SENTENCE_END = re.compile(r"(?<=[a-z0-9)*\"'][.!?])\s+(?=[A-Z\"(])")
_ABBREVIATION = re.compile(r"\b(?:[A-Z]|Mr|Mrs|Dr|St|No|vs|etc|e\.g|i\.e|cf|Sec|Hon|Gen|Col|Capt)\.$")


@dataclass(frozen=True)
class Passage:
    """Sentences of one document.

    Attributes:
        sentences: each without line breaks.
        following: the document's next sentence; "" at its end.
    """

    document: Document
    sentences: tuple[str, ...]
    following: str

    @property
    def text(self) -> str:
        """The sentences as one paragraph."""
        return " ".join(self.sentences)


def sentences_of(paragraph: str) -> list[str]:
    """The paragraph's sentences; an abbreviation's dot ends none."""
    found: list[str] = []
    for piece in _SENTENCE_END.split(paragraph):
        if found and _ABBREVIATION.search(found[-1]):
            found[-1] += f" {piece}"
        else:
            found.append(piece)
    return found


def passages(document: Document, words: tuple[int, int] = (35, 110)) -> Iterator[Passage]:
    """Disjoint passages of `words[0]` to `words[1]` words, two to seven whole sentences of at most 45 words each."""
    gathered: list[str] = []
    sentences = [sentence for paragraph in document.paragraphs for sentence in sentences_of(paragraph)]
    for index, sentence in enumerate(sentences):
        length = len(sentence.split())
        if length > 45 or not length >= 4 or not sentence.rstrip("\"')").endswith((".", "!", "?")) or sentence.count("|") > 0:
            gathered = []
            continue
        gathered.append(sentence)
        total = sum(len(one.split()) for one in gathered)
        if total > words[1]:
            gathered = gathered[-1:] if length <= words[1] else []
        elif len(gathered) >= 2 and (total >= words[0] + index * 7 % 50 or len(gathered) == 7):
            following = sentences[index + 1] if index + 1 < len(sentences) else ""
            yield Passage(document, tuple(gathered), following if len(following.split()) <= 60 else "")
            gathered = []
