"""A small real tokenizer with the Harmony special tokens, for synthetic checkpoints.

Byte-level BPE, trained on a few sentences, so any text can be encoded; ids are not those of the
published gpt-oss tokenizer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>", "<|call|>", "<|endofprompt|>",
)  # fmt: skip
"""Special tokens of the Harmony response format."""

EOS_TOKENS = ("<|return|>", "<|endoftext|>", "<|call|>")
"""Tokens that end a generation, the tokenizer's own `eos_token` first."""

_TEXT = """
A mixture of experts sends each token to a few of its experts. The router scores all of them, the best four are
chosen, and their outputs are added up, weighted by a softmax over the chosen scores. An expert that is never
chosen costs memory and nothing else. When a router is told not to choose an expert, the remaining ones share
its work. What is the sum of 12 and 30? It is 42. What is 7 times 8? It is 56. Then 56 minus 42 is 14.
def total(values): return sum(value for value in values if value > 0)
for index in range(10): print(index, index * index)
The server reads a prompt, computes one token at a time and stops when the answer is complete. Please write a
short list: first, second, third. Thank you. The quick answer is often the right one, but not always.
{"name": "search", "arguments": {"query": "weather in Paris", "limit": 3}}
"""

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}"
    "{% if message.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@dataclass(frozen=True)
class TokenizerFiles:
    """Files to lay beside a checkpoint, and the ids of the special tokens."""

    files: dict[str, Any]
    ids: dict[str, int]


def tokenizer_config(chat_template: str) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer with these special tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": EOS_TOKENS[0],
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "chat_template": chat_template,
    }


@functools.cache
def tokenizer_files(vocab_size: int = 512) -> TokenizerFiles:
    """Train the tokenizer; the same text and version give the same files.

    Args:
        vocab_size: entries at most, special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
    config = tokenizer_config(_CHAT_TEMPLATE)
    return TokenizerFiles({"tokenizer.json": tokenizer.to_str(pretty=False), "tokenizer_config.json": config}, ids)
