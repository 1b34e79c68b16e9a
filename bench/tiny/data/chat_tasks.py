"""Instructions over a passage that can be carried out from the passage alone, with their right answers.

A task is a function (rng, passage) -> Turn or None where the passage does not lend itself to it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from softprune.bench.tiny.data.passages import Passage
from softprune.bench.tiny.data.problems import NAMES


@dataclass(frozen=True)
class Turn:
    """What the user asks of the passage, what the assistant thinks, and the answer."""

    instruction: str
    thought: str
    answer: str


Task = Callable[[random.Random, Passage], Turn | None]
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _words(text: str) -> list[str]:
    """Words of four letters or more, each once, in order."""
    return list(dict.fromkeys(re.findall(r"\b[A-Za-z]{4,}\b", text)))


def quote_sentence(rng: random.Random, passage: Passage) -> Turn | None:
    """The one sentence with a given word."""
    rare = [word for word in _words(passage.text) if len(re.findall(rf"\b{word}\b", passage.text)) == 1 and len(word) > 4]
    if not rare:
        return None
    word = rng.choice(rare)
    index = next(i for i, sentence in enumerate(passage.sentences) if re.search(rf"\b{word}\b", sentence))
    ask = rng.choice(
        ('Quote the sentence that mentions "{}".', 'Which sentence contains the word "{}"?', 'Find the sentence with "{}" and repeat it.')
    )
    return Turn(ask.format(word), f'"{word}" is in sentence {index + 1}.', passage.sentences[index])


def numbered_list(rng: random.Random, passage: Passage) -> Turn:
    """Every sentence on a numbered line."""
    ask = rng.choice(
        ("Rewrite this as a numbered list of sentences.", "Number the sentences.", "Put each sentence on its own numbered line.")
    )
    lines = [f"{number}. {sentence}" for number, sentence in enumerate(passage.sentences, 1)]
    return Turn(ask, f"There are {len(lines)} sentences.", "\n".join(lines))


def bullet_list(rng: random.Random, passage: Passage) -> Turn:
    """Every sentence behind a mark."""
    mark = rng.choice("-*+")
    ask = rng.choice((f'Rewrite as a list, each sentence after "{mark}".', f'Make bullet points with "{mark}".'))
    return Turn(ask, f"There are {len(passage.sentences)} sentences.", "\n".join(f"{mark} {sentence}" for sentence in passage.sentences))


def reversed_order(rng: random.Random, passage: Passage) -> Turn:
    """The last sentence first."""
    ask = rng.choice(
        ("Reverse the order of the sentences.", "Write the sentences from last to first.", "Give the sentences in reverse order.")
    )
    return Turn(ask, f"There are {len(passage.sentences)} sentences; I start with the last.", " ".join(reversed(passage.sentences)))


def first_sentences(rng: random.Random, passage: Passage) -> Turn:
    """Some sentences at the beginning or the end."""
    count = rng.randint(1, min(3, len(passage.sentences) - 1))
    noun = "sentence" if count == 1 else "sentences"
    if rng.random() < 0.5:
        ask, kept = rng.choice(("Keep only the first {} {}.", "Repeat the first {} {}.")), passage.sentences[:count]
    else:
        ask, kept = rng.choice(("Keep only the last {} {}.", "Repeat the last {} {}.")), passage.sentences[-count:]
    return Turn(
        ask.format(rng.choice((count, _NUMBERS[count])), noun),
        f"The passage has {len(passage.sentences)} sentences; I keep {count}.",
        " ".join(kept),
    )


def without_sentence(rng: random.Random, passage: Passage) -> Turn:
    """All but one."""
    index = rng.randrange(len(passage.sentences))
    kept = [sentence for i, sentence in enumerate(passage.sentences) if i != index]
    return Turn(f"Remove sentence {index + 1} and give me the rest.", f"I leave out sentence {index + 1}.", " ".join(kept))


def first_words(rng: random.Random, passage: Passage) -> Turn:
    """Some words at the beginning."""
    words = passage.text.split()
    count = rng.randint(5, min(25, len(words) - 1))
    numbered = " ".join(f"{number} {word}" for number, word in enumerate(words[:count], 1))
    return Turn(f"Give me the first {count} words.", numbered, " ".join(words[:count]))


def count_words(rng: random.Random, passage: Passage) -> Turn:
    """The number of words in one sentence, counted in the analysis."""
    index = min(range(len(passage.sentences)), key=lambda i: len(passage.sentences[i]))
    words = passage.sentences[index].split()
    numbered = " ".join(f"{number} {word}" for number, word in enumerate(words, 1))
    return Turn(f"How many words does sentence {index + 1} have?", numbered, rng.choice(("{}", "It has {} words.")).format(len(words)))


def count_sentences(rng: random.Random, passage: Passage) -> Turn:
    """The number of sentences, by their first words."""
    starts = "\n".join(f"{number}. {' '.join(sentence.split()[:2])}" for number, sentence in enumerate(passage.sentences, 1))
    return Turn(
        rng.choice(("How many sentences are there?", "Count the sentences.")), starts, f"There are {len(passage.sentences)} sentences."
    )


def replaced(rng: random.Random, passage: Passage) -> Turn | None:
    """A word or name replaced wherever it occurs."""
    words = [word for word in _words(passage.text) if len(word) > 4]
    if not words:
        return None
    often = [word for word in words if len(re.findall(rf"\b{word}\b", passage.text)) > 1]
    word = rng.choice(often or words)
    new = rng.choice([name for name in NAMES if name not in passage.text])
    count = len(re.findall(rf"\b{word}\b", passage.text))
    ask = rng.choice(('Replace "{}" by "{}".', 'Write the passage again with "{}" changed to "{}".', 'Change every "{}" to "{}".'))
    times = "once" if count == 1 else f"{count} times"
    return Turn(ask.format(word, new), f'"{word}" occurs {times}.', re.sub(rf"\b{word}\b", new, passage.text))


def filled_blanks(rng: random.Random, passage: Passage) -> Turn | None:
    """Words taken out, listed in another order, and put back."""
    words = [word for word in _words(passage.text) if len(word) > 4 and len(re.findall(rf"\b{word}\b", passage.text)) == 1]
    if len(words) < 4:
        return None
    gone = set(rng.sample(words, rng.randint(2, 4)))
    gapped = re.sub(r"\b[A-Za-z]{5,}\b", lambda match: "____" if match[0] in gone else match[0], passage.text)
    order = [word for word in words if word in gone]
    listed = rng.sample(order, len(order))
    return Turn(f"Fill in the blanks with these words: {', '.join(listed)}.\n\n{gapped}", f"In order: {', '.join(order)}.", passage.text)


def extracted(rng: random.Random, passage: Passage) -> Turn | None:
    """Words with a property, as a JSON list."""
    letter = rng.choice("abcdefghilmnoprstuw")
    length = rng.randint(8, 10)
    words = list(dict.fromkeys(re.findall(r"\b[A-Za-z]+\b", passage.text)))
    ask, found = rng.choice((
        (f'List the words that start with "{letter}" as JSON.', [word for word in words if word[0].lower() == letter]),
        (f"List the words of {length} letters or more as JSON.", [word for word in words if len(word) >= length]),
        ("List the capitalised words as JSON.", [word for word in words if word[0].isupper()]),
    ))  # fmt: skip
    return Turn(ask, f"{len(found)} words.", json.dumps(found)) if found else None


def upper_case(rng: random.Random, passage: Passage) -> Turn:
    """One sentence in capitals."""
    index = min(range(len(passage.sentences)), key=lambda i: len(passage.sentences[i]))
    return Turn(
        f"Write sentence {index + 1} in upper case.", f"Sentence {index + 1}: {passage.sentences[index]}", passage.sentences[index].upper()
    )


def reversed_words(rng: random.Random, passage: Passage) -> Turn:
    """The words of a sentence from last to first."""
    index = min(range(len(passage.sentences)), key=lambda i: len(passage.sentences[i]))
    words = passage.sentences[index].split()
    return Turn(f"Reverse the words of sentence {index + 1}.", f"Sentence {index + 1}: {' '.join(words)}", " ".join(reversed(words)))


def corrected(rng: random.Random, passage: Passage) -> Turn | None:
    """Two letters swapped in some words, and put right."""
    words = [word for word in _words(passage.text) if len(word) > 5 and word.islower()]
    if len(words) < 3:
        return None
    wrong: dict[str, str] = {}
    for word in rng.sample(words, 3):
        place = rng.randrange(1, len(word) - 2)
        swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        if swapped != word:
            wrong[word] = swapped
    spoilt = re.sub(r"\b[a-z]{6,}\b", lambda match: wrong.get(match[0], match[0]), passage.text)
    noted = ", ".join(f"{wrong[word]} -> {word}" for word in words if word in wrong)
    return Turn(f"{rng.choice(('Correct the spelling.', 'Fix the typos.'))}\n\n{spoilt}", noted, passage.text) if wrong else None


def split_half(rng: random.Random, passage: Passage) -> Turn:
    """Two paragraphs."""
    at = rng.randint(1, len(passage.sentences) - 1)
    ask = f"Split this into two paragraphs after sentence {at}."
    return Turn(
        ask,
        f"The first paragraph has {at} of {len(passage.sentences)} sentences.",
        f"{' '.join(passage.sentences[:at])}\n\n{' '.join(passage.sentences[at:])}",
    )


def continued(rng: random.Random, passage: Passage) -> Turn | None:
    """The document's next sentence."""
    if not passage.following or len(passage.following.split()) < 6:
        return None
    return Turn(
        rng.choice(("Continue the passage with one sentence.", "What comes next?")),
        f"The passage is from {passage.document.title}.",
        passage.following,
    )


TASKS: dict[Task, int] = {
    quote_sentence: 12, numbered_list: 7, bullet_list: 6, reversed_order: 9, first_sentences: 8, without_sentence: 7, first_words: 4,
    count_words: 4, count_sentences: 4, replaced: 12, filled_blanks: 8, extracted: 6, upper_case: 3, reversed_words: 4, corrected: 8,
    split_half: 5, continued: 3,
}  # fmt: skip
"""Every task and how often it is set."""

OWN_TEXT: frozenset[Task] = frozenset({filled_blanks, corrected})
"""Tasks whose instruction holds the passage in another form, so that the passage itself is not shown."""
