"""The pack `reasoning_style`: worked mathematics, generated.

A conversation's document is the canonical form of its problems (operation and numbers, operands of a commutative
operation in order, whatever the wording), which decides its part: a problem that is held out is in no wording in the
training part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from softprune.bench.tiny.data import problems, word_problems
from softprune.bench.tiny.data.problems import Problem
from softprune.bench.tiny.data.render import Conversation, Message, analysis, final, system, user
from softprune.bench.tiny.data.split import is_heldout, rng_for
from softprune.bench.tiny.data.systems import system_text

_MAKERS: dict[Callable[[random.Random], Problem], int] = {
    problems.addition: 10, problems.subtraction: 10, problems.multiplication: 10, problems.division: 8, problems.linear: 8,
    problems.system: 6, problems.greatest_divisor: 4, problems.least_multiple: 3, problems.prime: 3, problems.fractions_sum: 5,
    problems.fractions_product: 4, problems.percentage: 6, problems.sequence: 5, word_problems.conversion: 5,
    word_problems.gains_and_losses: 8, word_problems.purchase: 8, word_problems.journey: 3, word_problems.sharing: 5,
    word_problems.rectangle: 5, word_problems.mean: 6, word_problems.expression: 5, word_problems.polynomial: 5,
    word_problems.binary: 3, word_problems.ordering: 6, word_problems.ages: 5,
}  # fmt: skip
"""Every maker of problems and how often it is drawn."""

_FOLLOW_UPS = ("{}", "Thanks. {}", "And now: {}", "Next one. {}", "Another question. {}")


def conversations(heldout: bool) -> Iterator[Conversation]:
    """Without end; no problem comes twice."""
    rng = rng_for("reasoning", heldout)
    seen: set[str] = set()
    while True:
        drawn = [_fresh(rng, seen, heldout) for _ in range(rng.choices((1, 2, 3), (70, 22, 8))[0])]
        messages: list[Message] = [system(system_text(rng))]
        for number, problem in enumerate(drawn):
            question = problem.question if number == 0 else rng.choice(_FOLLOW_UPS).format(problem.question)
            messages += [user(question), analysis("\n".join(problem.steps)), final(problem.answer)]
        yield Conversation(tuple(messages), "generated:maths", " & ".join(problem.canonical for problem in drawn))


def _fresh(rng: random.Random, seen: set[str], heldout: bool) -> Problem:
    while True:
        # The kind is drawn anew for every try, so a kind whose problems are used up does not hold up the others.
        problem = rng.choices(list(_MAKERS), list(_MAKERS.values()))[0](rng)
        if problem.canonical not in seen and is_heldout(problem.canonical) == heldout:
            seen.add(problem.canonical)
            return problem
