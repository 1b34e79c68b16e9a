"""The tokenizer of the tiny model: byte-level BPE of exactly 4096 ids, Harmony's special tokens among them.

Digits are split one by one, so that a number's digits can be computed with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from softprune.checkpoint.harmony import SPECIAL_TOKENS, tokenizer_config
from softprune.errors import InputError
from softprune.files import write_whole

VOCAB_SIZE = 4096

# Words with the space before them, punctuation, and runs of spaces (code's indentation) stay whole pieces.
_PIECES = r" ?[A-Za-z\u00c0-\u024f]+| ?[^\sA-Za-z\u00c0-\u024f0-9]+|[0-9]|\n+|[ \t]+(?=\S)|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{% if message.thinking is defined and message.thinking %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}"
    "{% if message.tool_calls is defined and message.tool_calls %}"
    "{% for tool_call in message.tool_calls %}{% set function = tool_call.function if tool_call.function is defined else tool_call %}"
    "<|start|>assistant to=functions.{{ function.name }}<|channel|>commentary <|constrain|>json<|message|>"
    "{% if function.arguments is string %}{{ function.arguments }}{% else %}{{ function.arguments | tojson }}{% endif %}<|call|>"
    "{% endfor %}"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ message.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}{% endif %}"
    "{% elif message.role == 'tool' %}"
    "<|start|>functions.{{ message.name }} to=assistant<|channel|>commentary<|message|>{{ message.content }}<|end|>"
    "{% else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""Harmony without what gpt-oss' own template adds by itself: the caller gives system and developer messages as they are.

`thinking` is the analysis channel of an assistant's message; a tool's message needs `name`.
"""


def train(texts: Iterable[str]) -> Tokenizer:
    """Train on Harmony texts, whose special tokens are learnt from nothing.

    Raises:
        InputError: too little text for 4096 ids.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"<\|[a-z]+\|>"), "removed"),
        pre_tokenizers.Split(Regex(_PIECES), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Only while training: afterwards the special tokens are cut out before this, and other text must not be lost.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PIECES), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if (size := tokenizer.get_vocab_size(with_added_tokens=True)) != VOCAB_SIZE:
        raise InputError("tokenizer", "vocab_size", str(size), f"{VOCAB_SIZE}: train on more text")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as Transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    write_whole(folder / "tokenizer_config.json", json.dumps(tokenizer_config(CHAT_TEMPLATE), indent=2) + "\n")


def load(folder: Path) -> Tokenizer:
    """The committed tokenizer."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
