"""Harmony conversations as text: which characters the assistant wrote, and the messages one by one.

Two readers with two purposes. `completion_spans` follows the study's scan to the letter (spec/metrics.md 1.2), lenient where it
is, so that figures can be compared. `parse_messages` refuses whatever is not well-formed, so that it can judge what a model wrote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from softprune.errors import InputError, shortened

START, MESSAGE, CHANNEL, CONSTRAIN = "<|start|>", "<|message|>", "<|channel|>", "<|constrain|>"
Terminator = Literal["<|end|>", "<|call|>", "<|return|>"]
TERMINATORS: tuple[Terminator, ...] = ("<|end|>", "<|call|>", "<|return|>")
ROLES = ("system", "developer", "user", "assistant", "tool")

_TERMINATOR = re.compile("|".join(map(re.escape, TERMINATORS)))
_TAG = re.compile("|".join(map(re.escape, (START, MESSAGE, CHANNEL, CONSTRAIN, *TERMINATORS))))
# A tool's own messages carry its name where the role stands.
_TOOL = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
_TO = "to="


class HarmonyError(InputError):
    """Text that is no well-formed Harmony conversation; `field` is `message[i]`, counted from 0."""


def completion_spans(text: str) -> list[tuple[int, int]]:
    """Character ranges [start, end) of what the assistant wrote, in order (spec/metrics.md 1.2).

    A range is the content of a message whose role is "assistant" or begins with "assistant ", whatever its channel; headers, tags
    and delimiters are not in it. A message without a terminator ends the scan and yields nothing.
    """
    spans: list[tuple[int, int]] = []
    position = 0
    while (start := text.find(START, position)) >= 0 and (message := text.find(MESSAGE, start)) >= 0:
        header = text[start + len(START) : message]
        role = header.split(CHANNEL, 1)[0].strip()
        content = message + len(MESSAGE)
        if not (end := _TERMINATOR.search(text, content)):
            break
        if role == "assistant" or role.startswith("assistant "):
            spans.append((content, end.start()))
        position = end.start() + 1
    return spans


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: one of `ROLES`, or a tool's dotted name, e.g. "functions.search".
        recipient: what stands after `to=`, wherever in the header; None without it.
        channel: e.g. "final"; None without one.
        content_type: e.g. "json"; None without one.
        content: the text between `<|message|>` and the terminator.
        terminator: the tag that ends it.
        start: index of its `<|start|>` in the text.
    """

    role: str
    recipient: str | None
    channel: str | None
    content_type: str | None
    content: str
    terminator: Terminator
    start: int


def parse_messages(text: str, source: str = "conversation") -> list[Message]:
    """All messages of a text that holds nothing else.

    Args:
        text: a rendered conversation, or what a model wrote from a `<|start|>` on.
        source: what the text is, for errors.

    Raises:
        HarmonyError: anything outside a message, a header that cannot be read, a tag out of place, or no terminator.
    """
    messages: list[Message] = []
    position = 0
    while position < len(text):
        field = f"message[{len(messages)}]"
        if not text.startswith(START, position):
            raise HarmonyError(source, field, shortened(text[position : position + 40]), START)
        start = position
        header, position = _until(text, start + len(START), (MESSAGE,), (CHANNEL, CONSTRAIN), source, field)
        content, end = _until(text, position + len(MESSAGE), TERMINATORS, (), source, field)
        terminator = next(tag for tag in TERMINATORS if text.startswith(tag, end))
        messages.append(Message(*_header(header, source, field), content, terminator, start))
        position = end + len(terminator)
    return messages


def _until(text: str, start: int, ends: tuple[str, ...], inside: tuple[str, ...], source: str, field: str) -> tuple[str, int]:
    """The text from `start` to the next of `ends`, and where that stands; of other tags only `inside` may come before."""
    for tag in _TAG.finditer(text, start):
        if tag[0] in ends:
            return text[start : tag.start()], tag.start()
        if tag[0] not in inside:
            raise HarmonyError(source, field, f"{tag[0]} after {shortened(text[start : tag.start()][-40:])}", " or ".join(ends))
    raise HarmonyError(source, field, "the end of the text", " or ".join(ends))


def _header(header: str, source: str, field: str) -> tuple[str, str | None, str | None, str | None]:
    """(role, recipient, channel, content type) of the text between `<|start|>` and `<|message|>`."""
    before, constrain, constrained = header.partition(CONSTRAIN)
    author, channelled, channel_part = before.partition(CHANNEL)
    if CONSTRAIN in constrained or CHANNEL in channel_part or CHANNEL in constrained:
        raise HarmonyError(source, field, shortened(header), f"{CHANNEL} and {CONSTRAIN} at most once each, in this order")
    role, *others = author.split() or [""]
    if role not in ROLES and not _TOOL.fullmatch(role):
        raise HarmonyError(source, field, f"role {shortened(role)}", f"{', '.join(ROLES)}, or a tool's dotted name")
    channel, *more = channel_part.split() or [""]
    if channelled and (not channel or channel.startswith(_TO)):
        raise HarmonyError(source, field, shortened(header), f"a channel's name after {CHANNEL}")
    if constrain and not constrained.strip():
        raise HarmonyError(source, field, shortened(header), f"a content type after {CONSTRAIN}")
    words = [*others, *more, *constrained.split()]
    recipients = [word.removeprefix(_TO) for word in words if word.startswith(_TO)]
    types = [word for word in words if not word.startswith(_TO)]
    if len(recipients) > 1 or len(types) > 1 or "" in recipients:
        raise HarmonyError(source, field, shortened(header), f"one {_TO}NAME and one content type at most")
    return role, recipients[0] if recipients else None, channel or None, types[0] if types else None
