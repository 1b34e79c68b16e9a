"""What the model answers: greedy samples, and whether its tool calls can be carried out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from softprune.evaluate.harmony import HarmonyError, Message, parse_messages

STOP_TOKENS = ("<|return|>", "<|call|>")
_NAMESPACE = "functions."
_DECLARED = re.compile(r"\btype\s+(\w+)\s*=\s*\(")


@dataclass(frozen=True)
class Prompt:
    """A held-out conversation, cut where the assistant's last turn begins.

    Attributes:
        row: its number in the pack.
        text: everything up to the first header of the assistant's last turn.
        reference: the rest.
    """

    row: int
    text: str
    reference: str


def cut_prompt(conversation: str, row: int) -> Prompt | None:
    """Cut after the last user message; None if there is none, or nothing after it.

    Raises:
        HarmonyError: the conversation is malformed.
    """
    messages = parse_messages(conversation, f"row {row}")
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if last is None or last + 1 == len(messages):
        return None
    cut = messages[last + 1].start
    return Prompt(row, conversation[:cut], conversation[cut:])


def declared_functions(prompt: str) -> set[str]:
    """Names that the developer messages declare, in the TypeScript form `type NAME = (…`."""
    return {
        name for message in parse_messages(prompt, "prompt") if message.role == "developer" for name in _DECLARED.findall(message.content)
    }


@dataclass(frozen=True)
class Call:
    """A tool call.

    Attributes:
        name: without its namespace.
        arguments: decoded JSON.
    """

    name: str
    arguments: dict[str, Any]


def first_call(text: str, declared: set[str]) -> Call:
    """The first tool call of an assistant's turn.

    Args:
        text: the turn from its first `<|start|>` on.
        declared: functions that may be called.

    Raises:
        HarmonyError: the text is malformed, calls nothing, calls what is not declared, or its arguments are no JSON object.
    """
    where = "generated text"
    messages = parse_messages(text, where)
    call: Message | None = next((message for message in messages if message.recipient is not None), None)
    if call is None:
        raise HarmonyError(where, "", "no message with a recipient", "a tool call")
    name = (call.recipient or "").removeprefix(_NAMESPACE)
    if call.recipient != _NAMESPACE + name or name not in declared:
        raise HarmonyError(where, "recipient", repr(call.recipient), f"{_NAMESPACE} and one of {', '.join(sorted(declared))}")
    if call.terminator != "<|call|>" or call.role != "assistant":
        raise HarmonyError(where, "terminator", f"{call.terminator} of {call.role}", "<|call|> of assistant")
    try:
        arguments = json.loads(call.content)
    except ValueError as error:
        raise HarmonyError(where, "arguments", f"no JSON ({error})", "a JSON object") from None
    if not isinstance(arguments, dict):
        raise HarmonyError(where, "arguments", type(arguments).__name__, "a JSON object")
    return Call(name, arguments)


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 256, batch_size: int = 25,
    progress: Callable[[int], None] | None = None,
) -> list[str]:  # fmt: skip
    """Greedy continuations with their special tokens, up to and with the token that ended them.

    Args:
        model, tokenizer: Transformers' own.
        prompts: rendered Harmony.
        max_new_tokens: at most.
        batch_size: prompts in one pass; those of like length come together.
        progress: called with the number of prompts done in each pass.
    """
    stops = tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        width = max(len(encoded[i]) for i in batch)
        ids = torch.tensor([[stops[0]] * (width - len(encoded[i])) + encoded[i] for i in batch])
        attended = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch])
        answers = model.generate(
            ids.to(model.device), attention_mask=attended.to(model.device), max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=stops, pad_token_id=stops[0],
        )[:, width:].tolist()  # fmt: skip
        for i, answer in zip(batch, answers, strict=True):
            end = next((at + 1 for at, token in enumerate(answer) if token in stops), len(answer))
            texts[i] = tokenizer.decode(answer[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if progress:
            progress(len(batch))
    return texts


def judge_calls(prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, Any]:
    """Shares over tool prompts whose reference calls a tool; JSON-ready.

    `valid`: the first call parses, with a declared name and a JSON object. `same_name`, `same_call`: it is also the reference's
    function; and has exactly its arguments.
    """
    valid = same_name = same_call = 0
    failures: list[dict[str, Any]] = []
    for prompt, text in zip(prompts, texts, strict=True):
        declared = declared_functions(prompt.text)
        expected = first_call(prompt.reference, declared)
        try:
            call = first_call(text, declared)
        except HarmonyError as error:
            failures.append({"row": prompt.row, "error": str(error), "generated": text})
            continue
        valid += 1
        same_name += call.name == expected.name
        same_call += call == expected
    count = len(prompts)
    shares = {"valid": valid / count, "same_name": same_name / count, "same_call": same_call / count} if count else {}
    return {"prompts": count, **shares, "failures": failures}
