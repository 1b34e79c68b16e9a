"""The pack `code`: tasks over functions of the Python standard library and of permissively licensed packages.

A document is a Python file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from softprune.bench.tiny.data.code_tasks import TASKS
from softprune.bench.tiny.data.dedup import NearDuplicates
from softprune.bench.tiny.data.documents import Document
from softprune.bench.tiny.data.functions import Function, functions
from softprune.bench.tiny.data.render import Conversation, Message, analysis, developer, final, system, user
from softprune.bench.tiny.data.split import is_heldout, rng_for
from softprune.bench.tiny.data.systems import system_text

_DEVELOPER = ("Answer with code.", "You are a programming assistant.", "Keep changes small.", "Write Python.")


def conversations(documents: Sequence[Document], heldout: bool, known: NearDuplicates) -> Iterator[Conversation]:
    """Until all functions are used up, one of every file in turn.

    Args:
        documents: of the code sources; those of the other part are left out here.
        known: functions of the parts made before, near-duplicates of which are left out; this part's are added.
    """
    rng = rng_for("code", heldout)
    own = [one for one in documents if is_heldout(one.name) == heldout]
    rng.shuffle(own)
    queues = [_from_file(rng_for("code", one.name), one, known) for one in own]
    while queues:
        left = []
        for queue in queues:
            conversation = next(queue, None)
            if conversation is not None:
                left.append(queue)
                yield conversation
        queues = left


def _from_file(rng: random.Random, document: Document, known: NearDuplicates) -> Iterator[Conversation]:
    found = [function for function in functions(document) if known.is_new(function.bare)]
    rng.shuffle(found)
    for index, function in enumerate(found):
        # Those shown beside it come later in the file's own row order, or begin anew.
        neighbours = [*found[index + 1 : index + 4], *found[:index][:3]]
        conversation = _about(rng, function, neighbours)
        if conversation is not None:
            yield conversation


def _about(rng: random.Random, function: Function, neighbours: list[Function]) -> Conversation | None:
    tasks, weights = list(TASKS), list(TASKS.values())
    for _ in range(4):
        turn = rng.choices(tasks, weights)[0](rng, function, neighbours)
        if turn is None:
            continue
        messages: list[Message] = [system(system_text(rng))]
        if rng.random() < 0.3:
            messages.append(developer(f"# Instructions\n{rng.choice(_DEVELOPER)}"))
        messages += [user(turn.instruction), analysis(turn.thought), final(turn.answer)]
        return Conversation(tuple(messages), function.document.source, function.document.name)
    return None
