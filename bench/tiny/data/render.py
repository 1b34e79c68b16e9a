"""Harmony: how gpt-oss writes a conversation down as one text.

The format is that of the published gpt-oss models: every message is `<|start|>HEADER<|message|>CONTENT` and one of
`<|end|>`, `<|call|>` (a tool is to answer) and `<|return|>` (the conversation is over). Engine and tokenizer free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from softprune.checkpoint.harmony import SPECIAL_TOKENS
from softprune.errors import InputError, shortened


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        header: all that stands between `<|start|>` and `<|message|>`.
        content: what the message says; no special token may occur in it.
        end: the token that closes it, without its bars; the last final message of a conversation is closed by `return`.
    """

    header: str
    content: str
    end: str = "end"

    def __str__(self) -> str:
        for token in SPECIAL_TOKENS:
            if token in self.content:
                raise InputError("conversation", "content", shortened(self.content), f"no special token, {token} occurs")
        return f"<|start|>{self.header}<|message|>{self.content}<|{self.end}|>"


def system(content: str) -> Message:
    """The first message of every conversation."""
    return Message("system", content)


def developer(content: str) -> Message:
    """Instructions and tools of whoever deploys the model."""
    return Message("developer", content)


def user(content: str) -> Message:
    """What the user says."""
    return Message("user", content)


def analysis(content: str) -> Message:
    """What the assistant thinks."""
    return Message("assistant<|channel|>analysis", content)


def final(content: str) -> Message:
    """What the assistant answers."""
    return Message("assistant<|channel|>final", content)


def call(name: str, arguments: Mapping[str, Any]) -> Message:
    """The assistant calls a function with JSON arguments."""
    header = f"assistant to=functions.{name}<|channel|>commentary <|constrain|>json"
    return Message(header, json.dumps(arguments, ensure_ascii=False), "call")


def result(name: str, value: Mapping[str, Any]) -> Message:
    """A function answers the assistant in JSON."""
    return Message(f"functions.{name} to=assistant<|channel|>commentary", json.dumps(value, ensure_ascii=False))


def render(messages: Sequence[Message]) -> str:
    """The conversation as one text, its last message closed by `<|return|>`.

    Raises:
        InputError: it does not end in the final channel, or a message holds a special token.
    """
    *head, last = messages
    if last.header != "assistant<|channel|>final":
        raise InputError("conversation", "messages[-1]", repr(last.header), "an assistant's message in the final channel")
    return "".join(map(str, head)) + str(Message(last.header, last.content, "return"))


@dataclass(frozen=True)
class Conversation:
    """A row of a pack.

    Attributes:
        messages: from the system's to the assistant's last.
        source: name of the source or generator.
        document: what the split goes by: a file, a page, or the canonical form of a generated problem.
    """

    messages: tuple[Message, ...]
    source: str
    document: str

    @cached_property
    def text(self) -> str:
        """The Harmony text."""
        return render(self.messages)
