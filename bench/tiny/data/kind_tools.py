"""The pack `tool_agentic`: requests, calls of declared tools in Harmony's commentary channel, and answers that use the results.

A conversation's document is the canonical form of its calls (tool and arguments, each of them on one side of the split
only), or its question and the tools' names where no tool is called.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from softprune.bench.tiny.data.problems import THINGS
from softprune.bench.tiny.data.render import Conversation, Message, analysis, call, developer, final, result, system, user
from softprune.bench.tiny.data.split import is_heldout, rng_for
from softprune.bench.tiny.data.systems import system_text
from softprune.bench.tiny.data.tool_specs import TOOLS, Tool
from softprune.bench.tiny.data.values import VALUES, full_name

Drawn = dict[str, str | int]

_JOINS = ("{} {}", "{} Also: {}", "{} And another thing: {}", "First: {} Then: {}")
_POLITE = ("{}", "{}", "{}", "Hello. {}", "{} Thank you.", "Could you help me? {}")


def conversations(heldout: bool) -> Iterator[Conversation]:
    """Without end; no set of calls comes twice."""
    rng = rng_for("tools", heldout)
    fresh = _Fresh(rng, heldout)
    while True:
        document, messages = rng.choices((_one_call, _two_calls, _follow_up, _no_tool, _missing), (52, 18, 16, 8, 6))[0](rng, fresh)
        yield Conversation((system(system_text(rng)), *messages), "generated:tools", document)


@dataclass(frozen=True)
class _Fresh:
    """Draws what belongs to one part and was not drawn before."""

    rng: random.Random
    heldout: bool
    seen: set[str] = field(default_factory=set)

    def take(self, canonical: str) -> bool:
        """Whether this part may have it, now and never again."""
        if canonical in self.seen or is_heldout(canonical) != self.heldout:
            return False
        self.seen.add(canonical)
        return True

    def call(self, tools: Sequence[Tool] = TOOLS) -> tuple[Tool, Drawn]:
        """One of these tools with arguments, or one of the others where theirs are used up."""
        for attempt in count():
            tool = self.rng.choice(tools if attempt < 100 else TOOLS)
            arguments = _draw(self.rng, tool.parameters)
            if self.take(_canonical(tool, arguments)):
                return tool, arguments
        raise AssertionError("the loop has no end")


def declaration(tools: list[Tool]) -> str:
    """The developer message's tools, as Harmony declares them: a TypeScript namespace."""
    lines = ["# Tools", "## functions", "namespace functions {"]
    for tool in tools:
        fields = ", ".join(f"{name}: {_type(kind)}" for name, kind in tool.parameters.items())
        lines += [f"// {tool.description}", f"type {tool.name} = (_: {{{fields}}}) => any;"]
    return "\n".join([*lines, "} // namespace functions"])


def _type(kind: str) -> str:
    if "|" in kind:
        return " | ".join(f'"{value}"' for value in kind.split("|"))
    return "number" if kind in ("small", "number", "large", "percent") else "string"


def _draw(rng: random.Random, kinds: dict[str, str]) -> Drawn:
    drawn: Drawn = {}
    for name, kind in kinds.items():
        value: str | int
        while (value := rng.choice(kind.split("|")) if "|" in kind else VALUES[kind](rng)) in drawn.values():
            pass
        drawn[name] = value
    return drawn


def _canonical(tool: Tool, arguments: Drawn) -> str:
    return f"{tool.name} {json.dumps(arguments, sort_keys=True)}"


def _tools_with(rng: random.Random, needed: list[Tool]) -> list[Tool]:
    others = [tool for tool in TOOLS if tool not in needed]
    tools = [*needed, *rng.sample(others, rng.randint(1, 3))]
    rng.shuffle(tools)
    return tools


def _think(tool: Tool, arguments: Drawn) -> Message:
    given = ", ".join(f"{name} {value}" for name, value in arguments.items())
    return analysis(f"I need {tool.name} with {given}.")


def _called(rng: random.Random, tool: Tool, arguments: Drawn) -> tuple[list[Message], str]:
    """Messages from the thought to the tool's answer, and the sentence that tells it."""
    answer: dict[str, Any] = _draw(rng, tool.answer)
    report = rng.choice(tool.reports).format(**{**arguments, **answer})
    return [_think(tool, arguments), call(tool.name, arguments), result(tool.name, answer)], report


def _request(rng: random.Random, tool: Tool, arguments: Drawn) -> str:
    text = rng.choice(tool.requests).format(**arguments)
    return text[0].upper() + text[1:]


def _one_call(rng: random.Random, fresh: _Fresh) -> tuple[str, list[Message]]:
    tool, arguments = fresh.call()
    steps, report = _called(rng, tool, arguments)
    head = [developer(declaration(_tools_with(rng, [tool]))), user(rng.choice(_POLITE).format(_request(rng, tool, arguments)))]
    return _canonical(tool, arguments), [*head, *steps, final(report)]


def _pair(rng: random.Random, fresh: _Fresh) -> tuple[tuple[Tool, Drawn], tuple[Tool, Drawn], Message, str]:
    """Two calls, three times in ten of one tool, with their declaration and document."""
    one, given = fresh.call()
    two, also = fresh.call((one, rng.choice(TOOLS)) if rng.random() < 0.3 else TOOLS)
    declared = developer(declaration(_tools_with(rng, [one] if one is two else [one, two])))
    return (one, given), (two, also), declared, f"{_canonical(one, given)} & {_canonical(two, also)}"


def _two_calls(rng: random.Random, fresh: _Fresh) -> tuple[str, list[Message]]:
    one, two, declared, document = _pair(rng, fresh)
    steps, report = _called(rng, *one)
    more, second_report = _called(rng, *two)
    asked = user(rng.choice(_JOINS).format(_request(rng, *one), _request(rng, *two)))
    return document, [declared, asked, *steps, *more, final(f"{report} {second_report}")]


def _follow_up(rng: random.Random, fresh: _Fresh) -> tuple[str, list[Message]]:
    """A second turn of the user, with the same tool or another one that was declared."""
    one, two, declared, document = _pair(rng, fresh)
    steps, report = _called(rng, *one)
    more, second_report = _called(rng, *two)
    return document, [declared, user(_request(rng, *one)), *steps, final(report), user(_request(rng, *two)), *more, final(second_report)]


def _no_tool(rng: random.Random, fresh: _Fresh) -> tuple[str, list[Message]]:
    """What can be answered from the declarations or from the question alone."""
    while True:
        tools = _tools_with(rng, [rng.choice(TOOLS)])
        tool = rng.choice(tools)
        name, number, thing = full_name(rng), VALUES["number"](rng), rng.choice(THINGS)
        listed = "\n".join(f"- {other.name}: {other.description}" for other in tools)
        takes = ", ".join(tool.parameters)
        greeting = f"I am {name}."
        question, thought, answer = rng.choice((
            (f"{greeting} What can you do for me?", "The user asks what I can do. I list my tools.", f"Hello {name}, I can:\n{listed}"),
            (f"{greeting} Which arguments does {tool.name} take?", f"{tool.name} takes {takes}. No call is needed.", f"It takes: {takes}."),
            (f"{greeting} I have {number} {thing}. How many {thing} do I have?", "The user said it.", f"You have {number}, {name}."),
            (f"Thanks, that was all. Best regards, {name}", "The user says goodbye. No tool is needed.", f"You are welcome, {name}."),
            (f"{greeting} What does {tool.name} do?", "The declaration says it.", f"{name}, it does this: {tool.description}"),
        ))  # fmt: skip
        document = f"none: {question} {', '.join(sorted(other.name for other in tools))}"
        if fresh.take(document):
            return document, [developer(declaration(tools)), user(question), analysis(thought), final(answer)]


def _missing(rng: random.Random, fresh: _Fresh) -> tuple[str, list[Message]]:
    """The request leaves an argument out; the assistant asks for it, is told, and calls."""
    tool, arguments = fresh.call([tool for tool in TOOLS if len(tool.parameters) > 1])
    left_out = rng.choice(list(arguments))
    said = ", ".join(f"{name} {value}" for name, value in arguments.items() if name != left_out)
    steps, report = _called(rng, tool, arguments)
    messages = [
        developer(declaration(_tools_with(rng, [tool]))),
        user(f"Please use {tool.name} with {said}."),
        analysis(f"{tool.name} also needs {left_out}, which the user did not say."),
        final(f"Which {left_out} should I use?"),
        user(rng.choice(("{}", "{} please", "Use {}.", "It is {}.")).format(arguments[left_out])),
    ]
    return _canonical(tool, arguments), [*messages, *steps, final(report)]
