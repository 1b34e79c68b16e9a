"""A 5-gram model over token ids with modified, interpolated Kneser-Ney smoothing, by KenLM.

Words are the ids in decimals, sentences are conversations. All orders are kept and nothing is pruned; the discounts are estimated
from the counts of counts, with KenLM's fallback where these allow none. Every id of the vocabulary that never occurs in training is
an unknown word, which KenLM gives a share of the unigrams.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.bench.tiny.baseline_kenlm import Kenlm, KenlmError, run
from softprune.evaluate.packing import Blocks

ORDER = 5
_LN10 = float(np.log(10.0))
_STATISTICS = re.compile(r"^(\d+) (\d+) D1=(\S+) D2=(\S+) D3\+=(\S+)$", re.MULTILINE)
_FALLBACK = re.compile(r"fallback discounts for order (\d+)")
Ids = NDArray[Any]


@dataclass(frozen=True)
class Ngram:
    """An estimated model.

    Attributes:
        kenlm: the programs.
        arpa: the model's file.
        facts: JSON-ready: tokens and conversations of training, per order the n-grams and discounts, seconds.
    """

    kenlm: Kenlm
    arpa: Path
    facts: dict[str, Any]

    def log_p(self, conversations: Sequence[Ids]) -> tuple[list[NDArray[np.float32]], int]:
        """Natural log-probability of every id, given all ids before it in its conversation, and the number of unknown ids.

        Raises:
            KenlmError: KenLM answered other than it documents.
        """
        answer = run([self.kenlm.query, "-v", "word", "-v", "sentence", self.arpa], input="".join(_lines(conversations))).stdout
        scores: list[NDArray[np.float32]] = []
        unknown = 0
        for ids, line in zip(conversations, answer.split("\n"), strict=False):
            # word=vocab_id ngram_length log10(p), a tab after each; then the end of the sentence and its totals.
            words = [word.split(" ") for word in line.split("\t") if word][: len(ids)]
            if [word[0].split("=")[0] for word in words] != [str(i) for i in ids]:
                raise KenlmError(f"query: found {line[:80]!r} for the ids {ids[:8].tolist()}…; expected one entry a word")
            unknown += sum(word[0].endswith("=0") for word in words)
            scores.append(np.array([float(word[2]) * _LN10 for word in words], np.float32))
        if len(scores) != len(conversations):
            raise KenlmError(f"query: found {len(scores)} lines; expected {len(conversations)}")
        return scores, unknown


def _lines(conversations: Iterable[Ids]) -> Iterable[str]:
    return (" ".join(map(str, ids.tolist())) + "\n" for ids in conversations)


def estimate(kenlm: Kenlm, conversations: Sequence[Ids], folder: Path, order: int = ORDER, memory: str = "4G") -> Ngram:
    """Estimate a model; for 24 million ids it takes a few minutes.

    Args:
        kenlm: from `kenlm.build`.
        conversations: ids of each, without an EOS id at the end.
        folder: where the model and the temporary files go.
        order: n.
        memory: for sorting, as KenLM writes it.

    Raises:
        KenlmError: KenLM failed.
    """
    started = time.monotonic()
    text, arpa = folder / "train.txt", folder / "model.arpa"
    with open(text, "w", encoding="ascii") as file:
        file.writelines(_lines(conversations))
    how = ["--order", str(order), "--discount_fallback", "--memory", memory, "--temp_prefix", f"{folder}/"]
    said = run([kenlm.lmplz, *how, "--text", text, "--arpa", arpa]).stderr
    text.unlink()
    orders = [
        {"order": int(n), "ngrams": int(count), "discounts": [float(d) for d in discounts]}
        for n, count, *discounts in _STATISTICS.findall(said)
    ]
    facts = {
        "train_tokens": sum(len(ids) for ids in conversations),
        "train_conversations": len(conversations),
        "orders": orders,
        # KenLM counts the orders in this message from 0.
        "fallback_discounts_for_orders": [int(n) + 1 for n in _FALLBACK.findall(said)],
        "seconds": round(time.monotonic() - started, 1),
    }
    return Ngram(kenlm, arpa, facts)


def split_conversations(stream: Ids, eos: int, opening: Sequence[int]) -> list[Ids]:
    """Cut a training stream into conversations, each without the EOS id that packing put after it.

    Args:
        stream: ids of conversations, one EOS id after each.
        eos: that id; it also ends messages inside.
        opening: ids with which every conversation begins.
    """
    starts = np.flatnonzero(np.concatenate([[True], stream[:-1] == eos]))
    starts = starts[starts + len(opening) <= len(stream)]
    begins = np.stack([stream[starts + i] == token for i, token in enumerate(opening)]).all(axis=0)
    return [part[:-1] if part[-1] == eos else part for part in np.split(stream, starts[begins][1:])]


def score_blocks(ngram: Ngram, blocks: Blocks) -> tuple[NDArray[np.float32], int]:
    """Natural log-probabilities [num_blocks, seq_len] of a pack's blocks, and the number of unknown ids.

    Each token is predicted from its whole conversation so far, also where a block begins inside it: the model that it is compared
    with sees less there.
    """
    flat, row = blocks.ids.reshape(-1), blocks.row.reshape(-1)
    conversations = np.split(flat, np.flatnonzero(np.diff(row)) + 1)
    scores, unknown = ngram.log_p(conversations)
    return np.concatenate(scores).reshape(blocks.ids.shape), unknown
