"""Completion text, packing and reference scores are what spec/metrics.md 1.1, 1.2 and 1.4 say."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from softprune.checkpoint.harmony import tokenizer_files
from softprune.evaluate.errors import EvaluationError
from softprune.evaluate.harmony import HarmonyError, Message, completion_spans, parse_messages
from softprune.evaluate.packing import PackError, encode_row, pack_rows, read_rows, shuffled, union
from softprune.evaluate.reference import mean_nll, perplexity, score

USER = "<|start|>user<|message|>Add 2 and 3.<|end|>"
ANALYSIS = "<|start|>assistant<|channel|>analysis<|message|>2+3=5<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>It is 5.<|return|>"
CALL = '<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>{"a": 2}<|call|>'
ANSWER = '<|start|>functions.add to=assistant<|channel|>commentary<|message|>{"sum": 5}<|end|>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(tokenizer_files().files["tokenizer.json"])
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|return|>")


def completions(text: str) -> list[str]:
    return [text[start:end] for start, end in completion_spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (USER + ANALYSIS + CALL + ANSWER + FINAL, ["2+3=5", '{"a": 2}', "It is 5."]),
        ("<|start|>assistant<|message|>no channel<|end|>", ["no channel"]),
        ("<|start|> assistant <|channel|>final<|message|>stripped<|end|>", ["stripped"]),
        ("<|start|>assistants<|message|>another role<|end|>", []),
        ("<|start|>Assistant<|message|>another role<|end|>", []),
        # A channel after the message belongs to the content.
        ("<|start|>assistant<|message|>a<|channel|>b<|end|>", ["a<|channel|>b"]),
        # An unterminated message ends the scan, and the text before the first start tag is passed over.
        ("x<|end|>" + FINAL + "<|start|>assistant<|message|>cut off", ["It is 5."]),
        # Without a terminator of its own, a message runs on to the next one's: its role counts.
        ("<|start|>user<|message|>open" + FINAL, []),
        ("<|start|>assistant<|message|>open" + USER, ["open<|start|>user<|message|>Add 2 and 3."]),
        # The next message tag is taken, even beyond another start tag; the role is then no assistant's.
        ("<|start|>assistant" + USER, []),
        ("<|start|>assistant<|channel|>final", []),
        ("<|start|>assistant<|message|><|end|>", [""]),
        ("", []),
    ],
)
def test_spans(text: str, expected: list[str]) -> None:
    assert completions(text) == expected


def test_messages() -> None:
    text = USER + ANALYSIS + CALL + ANSWER + FINAL
    messages = parse_messages(text)
    assert [(m.role, m.recipient, m.channel, m.content_type, m.terminator) for m in messages] == [
        ("user", None, None, None, "<|end|>"),
        ("assistant", None, "analysis", None, "<|end|>"),
        ("assistant", "functions.add", "commentary", "json", "<|call|>"),
        ("functions.add", "assistant", "commentary", None, "<|end|>"),
        ("assistant", None, "final", None, "<|return|>"),
    ]
    assert [m.content for m in messages if m.role == "assistant"] == completions(text)
    assert all(text[m.start :].startswith("<|start|>" + m.role) for m in messages)
    assert parse_messages("") == []
    other = parse_messages('<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2}<|call|>')
    assert other == [Message(**{**vars(messages[2]), "start": 0})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "message[0]: found 'hello'; expected <|start|>"),
        (USER + "\n" + FINAL, "message[1]: found '\\n<|start|>assistant"),
        (USER + "<|start|>assistant<|channel|>final<|message|>cut", "message[1]: found the end of the text; expected <|end|> or"),
        ("<|start|>user", "found the end of the text; expected <|message|>"),
        ("<|start|>user<|end|>", "found <|end|> after 'user'; expected <|message|>"),
        ("<|start|>user<|message|>a<|start|>", "found <|start|> after 'a'"),
        ("<|start|>user<|message|>a<|channel|>b<|end|>", "found <|channel|> after 'a'"),
        ("<|start|>robot<|message|>a<|end|>", "role 'robot'"),
        ("<|start|><|message|>a<|end|>", "role ''"),
        ("<|start|>assistant<|channel|><|message|>a<|end|>", "a channel's name"),
        ("<|start|>assistant<|channel|>a<|channel|>b<|message|>a<|end|>", "at most once each"),
        ("<|start|>assistant<|constrain|>json<|channel|>final<|message|>a<|end|>", "at most once each"),
        ("<|start|>assistant<|channel|>final<|constrain|> <|message|>a<|end|>", "a content type"),
        ("<|start|>assistant to=a to=b<|message|>a<|end|>", "one to=NAME"),
        ("<|start|>assistant to=<|message|>a<|end|>", "one to=NAME"),
    ],
)
def test_malformed_messages(text: str, message: str) -> None:
    with pytest.raises(HarmonyError) as caught:
        parse_messages(text)
    assert message in str(caught.value)


def test_kept_tokens_are_those_of_the_spans(tokenizer: Any) -> None:
    text = USER + ANALYSIS + "<|start|>assistant<|channel|>final<|message|>Thé 5 – ok.<|return|>"
    row = encode_row(text, tokenizer)
    kept = [tokenizer.decode([i]) for i in row.ids[row.keep]]
    assert "".join(kept[:5]) == "2+3=5"
    assert tokenizer.decode(row.ids[row.keep]).replace("2+3=5", "") == "Thé 5 – ok."
    assert not {"<|start|>", "<|message|>", "<|end|>", "<|return|>"} & set(kept)


def test_a_token_across_a_spans_border_counts() -> None:
    text = "<|start|>assistant<|message|>ab<|end|>"
    offsets = [(0, 20), (20, 30), (30, 31), (31, 38), (0, 0)]
    fake = lambda _text, **_: {"input_ids": [1, 2, 3, 4, 5], "offset_mapping": offsets}  # noqa: E731
    assert text[29:31] == "ab"
    assert encode_row(text, fake).keep.tolist() == [False, True, True, False, False]


def test_blocks_are_cut_at_exactly_their_length(tokenizer: Any) -> None:
    rows = [USER + FINAL, ANALYSIS + FINAL, CALL, USER + ANALYSIS + FINAL, "<|start|>never read"]
    encoded = [encode_row(row, tokenizer) for row in rows[:4]]
    eos = tokenizer.eos_token_id
    flat = np.concatenate([np.append(row.ids, eos) for row in encoded])
    keep = np.concatenate([np.append(row.keep, False) for row in encoded])
    length = 7
    need = sum(len(row.ids) + 1 for row in encoded[:3]) // length + 1
    reading = iter(rows)
    blocks = pack_rows(reading, tokenizer, length, need, "rows")
    assert list(reading) == ["<|start|>never read"]
    assert blocks.ids.reshape(-1).tolist() == flat[: need * length].tolist()
    expected = keep[: need * length].reshape(need, length).copy()
    assert expected[:, 0].any(), "a block has to begin inside a completion for this to show anything"
    expected[:, 0] = False
    assert (blocks.keep == expected).all()
    assert blocks.num_kept == expected.sum()
    assert blocks.rows_seen == 4
    assert blocks.rows_sha256 == hashlib.sha256("".join(row + "\0" for row in rows[:4]).encode()).hexdigest()
    first = len(encoded[0].ids)
    assert blocks.row.reshape(-1)[[0, first, first + 1]].tolist() == [0, 0, 1]
    assert blocks.ids.reshape(-1)[first] == eos
    everything = pack_rows(rows[:4], tokenizer, length, None, "rows")
    assert len(everything.ids) == len(flat) // length
    assert (everything.ids[:need] == blocks.ids).all()


def test_a_full_block_stops_the_reading(tokenizer: Any) -> None:
    length = len(encode_row(USER, tokenizer).ids) + 1
    assert pack_rows([USER, FINAL], tokenizer, length, 1, "rows").rows_seen == 1


def test_too_few_rows(tokenizer: Any) -> None:
    with pytest.raises(PackError, match=r"rows: found 0 blocks \(1 rows, \d+ tokens\); expected 2 blocks of 64 tokens"):
        pack_rows([USER], tokenizer, 64, 2, "rows")
    with pytest.raises(PackError, match="expected at least 1 blocks"):
        pack_rows([], tokenizer, 64, None, "rows")


def test_a_seed_decides_the_order_whatever_the_order_before() -> None:
    rows = [f"row {i}" for i in range(50)]
    found = [list(shuffled(order, seed)) for order in (rows, rows[::-1]) for seed in (0, 1)]
    assert found[0] == found[2] != rows
    assert found[1] == found[3] != found[0]
    assert sorted(found[1]) == sorted(rows)


def test_union_takes_turns_and_goes_on_with_the_longer() -> None:
    assert list(union([["a1"], ["b1", "b2", "b3"], [], ["d1", "d2"]])) == ["a1", "b1", "d1", "b2", "d2", "b3"]
    assert list(union([])) == []


def test_rows_of_a_pack(tmp_path: Path) -> None:
    path = tmp_path / "pack.parquet"
    pq.write_table(pa.table({"text": ["a", None, " \n", "b", "c"], "number": [1, 2, 3, 4, 5]}), path, row_group_size=2)
    assert list(read_rows(path)) == ["a", "b", "c"]
    for column, found in (("words", "found columns text, number"), ("number", "number: found type int64")):
        with pytest.raises(PackError, match=found):
            list(read_rows(path, column))
    with pytest.raises(PackError, match="No such file"):
        list(read_rows(tmp_path / "none.parquet"))
    (tmp_path / "bad.parquet").write_text("no parquet at all")
    with pytest.raises(PackError, match="found no Parquet"):
        list(read_rows(tmp_path / "bad.parquet"))


def test_rows_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "pack.jsonl"
    path.write_text('{"text": "a"}\n{"text": null, "number": 2}\n{"text": " "}\n{"text": "b\\n"}\n')
    assert list(read_rows(path)) == ["a", "b\n"]
    for line, found in (
        ("{", "line 5: found no JSON"),
        ('{"words": 1}', "line 5.text: found None"),
        ('["text"]', "line 5.text"),
        ("", "line 5"),
    ):
        path.write_text('{"text": "a"}\n' * 4 + line + "\n")
        with pytest.raises(PackError, match=found):
            list(read_rows(path))


class Bigram(torch.nn.Module):
    """Logits depend on the last token only: row i of the table follows token i."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.tensor(table)
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def test_scores_by_hand() -> None:
    # After 0: 1/2, 1/4, 1/4. After 1: certain of 2. After 2: uniform.
    table = [[math.log(0.5), math.log(0.25), math.log(0.25)], [-math.inf, -math.inf, 0.0], [1.0, 1.0, 1.0]]
    ids = np.array([[0, 1, 2, 0], [2, 2, 0, 0], [0, 0, 1, 2]], np.int32)
    steps: list[int] = []
    scores = score(Bigram(table), ids, batch_size=2, entropies=True, top=2, progress=steps.append)
    assert steps == [2, 1]
    assert np.isnan(scores.log_p[:, 0]).all()
    expected = np.log([[0.25, 1.0, 1 / 3], [1 / 3, 1 / 3, 0.5], [0.5, 0.25, 1.0]])
    np.testing.assert_allclose(scores.log_p[:, 1:], expected, atol=1e-6)
    assert scores.entropy is not None
    assert scores.top_entropy is not None
    np.testing.assert_allclose(scores.entropy[0, 1:], [1.5 * math.log(2), 0.0, math.log(3)], atol=1e-6)
    # The two likeliest after 0 are 2/3 and 1/3 once renormalised.
    top = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(2)
    np.testing.assert_allclose(scores.top_entropy[0, 1:], [top, 0.0, 1.0], atol=1e-6)
    keep = np.array([[False, True, False, False], [False] * 4, [False, False, True, False]])
    assert perplexity(scores.log_p, keep) == pytest.approx(4.0)
    assert mean_nll(scores.log_p, keep) == pytest.approx(math.log(4))


def test_no_number_is_made_up() -> None:
    log_p = np.array([[np.nan, -1.0, -np.inf]], np.float32)
    with pytest.raises(EvaluationError, match="no completion tokens"):
        perplexity(log_p, np.zeros((1, 3), np.bool_))
    with pytest.raises(EvaluationError, match="1 of 2 completion tokens"):
        perplexity(log_p, np.array([[False, True, True]]))
    assert perplexity(np.array([[-50.0]]), np.array([[True]])) == pytest.approx(math.exp(30))
