"""The packs of the tiny model: rendered as Harmony, split without overlap, answered rightly, rebuilt to the same bytes.

The first half builds small samples without the network; the second half judges the packs that are committed.
"""

from __future__ import annotations

import ast
import json
import re
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from softprune.bench.tiny import PACKS
from softprune.bench.tiny.data import kind_chat, kind_code, kind_reasoning, kind_tools, tokenizer
from softprune.bench.tiny.data.arithmetic import added, common_divisor, divided, multiplied, subtracted
from softprune.bench.tiny.data.dedup import NearDuplicates
from softprune.bench.tiny.data.documents import Document
from softprune.bench.tiny.data.manpage import manpage_items, manpage_paragraphs
from softprune.bench.tiny.data.pack_files import MAX_ROW_TOKENS, Row, read_pack, write_pack
from softprune.bench.tiny.data.part import rows_sha256
from softprune.bench.tiny.data.render import Conversation, analysis, call, final, render, result, system, user
from softprune.bench.tiny.data.sources import Source, fetch
from softprune.bench.tiny.data.split import is_heldout
from softprune.bench.tiny.data.tool_specs import TOOLS
from softprune.bench.tiny.packs import same, take
from softprune.checkpoint.harmony import SPECIAL_TOKENS
from softprune.errors import InputError
from softprune.evaluate.harmony import completion_spans, parse_messages

TINY = Path(__file__).parents[2] / "bench" / "tiny"

_WORDS = [
    "river",
    "stone",
    "market",
    "window",
    "garden",
    "engine",
    "letter",
    "harbor",
    "silver",
    "winter",
    "captain",
    "orchard",
    "bridge",
    "lantern",
    "meadow",
    "copper",
]


def _prose(number: int) -> Document:
    """Text in which every sentence is another one."""
    sentences = [
        f"The {_WORDS[(number + i) % 16]} of house {number} was near the {_WORDS[(number * 3 + i * i) % 16]} when {number * 50 + i} came."
        for i in range(24)
    ]
    return Document("python3.11-doc", f"python3.11-doc:page{number}", f"Page {number}", (" ".join(sentences),))


def _code(number: int) -> Document:
    functions = [
        f'def compute_{number}_{i}(first, second_{i}):\n    """Combine {_WORDS[i]} {number} with {_WORDS[number % 16]}."""\n'
        f"    total = first * {number} + {i}\n    for step in range(second_{i}):\n        total += step ** {i} - helper_{number}(first)\n"
        f"    if total > {number * i}:\n        return total\n    return first - {i}\n"
        for i in range(4)
    ]
    return Document("click", f"click:file{number}.py", f"file{number}.py", ("import os\n\n\n" + "\n\n".join(functions),))


def _sample(heldout: bool) -> dict[str, list[Conversation]]:
    prose, code = [_prose(number) for number in range(80)], [_code(number) for number in range(80)]
    return {
        "reasoning_style": list(islice(kind_reasoning.conversations(heldout), 150)),
        "tool_agentic": list(islice(kind_tools.conversations(heldout), 150)),
        "chat_if": list(islice(kind_chat.conversations(prose, heldout, NearDuplicates()), 60)),
        "code": list(islice(kind_code.conversations(code, heldout, NearDuplicates()), 60)),
    }


@pytest.fixture(scope="module")
def train() -> dict[str, list[Conversation]]:
    return _sample(heldout=False)


def test_a_conversation_is_rendered_as_gpt_oss_writes_it() -> None:
    messages = [system("S"), user("U"), analysis("A"), call("f", {"x": 1}), result("f", {"y": "é"}), final("F")]
    assert render(messages) == (
        "<|start|>system<|message|>S<|end|><|start|>user<|message|>U<|end|><|start|>assistant<|channel|>analysis<|message|>A<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"x": 1}<|call|>'
        '<|start|>functions.f to=assistant<|channel|>commentary<|message|>{"y": "é"}<|end|>'
        "<|start|>assistant<|channel|>final<|message|>F<|return|>"
    )


def test_special_tokens_in_a_message_are_refused() -> None:
    with pytest.raises(InputError, match="no special token"):
        render([user("say <|end|>"), final("no")])
    with pytest.raises(InputError, match="final channel"):
        render([final("yes"), user("why?")])


@pytest.mark.parametrize("pack", PACKS)
def test_no_document_is_in_both_parts(pack: str, train: dict[str, list[Conversation]]) -> None:
    heldout = _sample(heldout=True)[pack]
    assert heldout
    assert train[pack]
    documents = {document for one in heldout for document in one.document.split(" & ")}
    assert all(is_heldout(document) for document in documents)
    assert not documents & {document for one in train[pack] for document in one.document.split(" & ")}


def test_a_second_build_gives_the_same_rows(train: dict[str, list[Conversation]]) -> None:
    again = _sample(heldout=False)
    assert {pack: [one.text for one in rows] for pack, rows in again.items()} == {
        pack: [one.text for one in rows] for pack, rows in train.items()
    }


def test_no_problem_and_no_call_comes_twice(train: dict[str, list[Conversation]]) -> None:
    for pack in ("reasoning_style", "tool_agentic"):
        documents = [document for one in train[pack] for document in one.document.split(" & ")]
        assert len(documents) == len(set(documents))


def test_arithmetic_is_right() -> None:
    for a, b in ((0, 0), (7, 5), (999, 1), (1000, 999), (50_005, 4_995), (314, 159)):
        assert added(a, b)[1] == a + b
        assert subtracted(max(a, b), min(a, b))[1] == abs(a - b)
        assert multiplied(a, b % 100)[1] == a * (b % 100)
        assert divided(a, b + 1)[1:] == divmod(a, b + 1)
    assert common_divisor(84, 36)[1] == 12


def test_every_equation_in_the_worked_maths_holds(train: dict[str, list[Conversation]]) -> None:
    checked = 0
    for conversation in train["reasoning_style"]:
        for left, right in re.findall(r"(?m)(?:^|: )((?:\d+ [-+*] )+\d+) = (\d+)(?=$|[,<])", conversation.text):
            assert eval(left) == int(right), (left, right)
            checked += 1
    assert checked > 500


def test_calls_take_what_the_declaration_says_and_the_answer_uses_the_result(train: dict[str, list[Conversation]]) -> None:
    tools = {tool.name: tool for tool in TOOLS}
    assert len(tools) >= 25
    calls = 0
    for conversation in train["tool_agentic"]:
        for name, arguments in re.findall(
            r"to=functions\.(\w+)<\|channel\|>commentary <\|constrain\|>json<\|message\|>(.*?)<\|call\|>", conversation.text
        ):
            assert f"type {name} = " in conversation.text
            assert list(json.loads(arguments)) == list(tools[name].parameters)
            calls += 1
    assert calls > 100


def test_code_in_answers_parses_where_it_is_a_function(train: dict[str, list[Conversation]]) -> None:
    parsed = 0
    for conversation in train["code"]:
        answer = conversation.messages[-1].content
        if answer.startswith("```python\ndef "):
            ast.parse(answer.removeprefix("```python\n").removesuffix("```"))
            parsed += 1
    assert parsed > 20


def test_near_duplicates_are_found() -> None:
    known = NearDuplicates()
    text = " ".join(f"{_WORDS[i % 16]} {i}" for i in range(40))
    assert known.is_new(text)
    assert not known.is_new(text.replace("river 0", "stream 0"))
    assert known.is_new("Something else altogether, of which not one run of five words came before.")


def test_a_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    source = Source("x", "1.0", "pypi", "x-1.0.whl", "0" * 64, "MIT", "code")
    (tmp_path / source.file).write_bytes(b"something else")
    with pytest.raises(InputError, match=r"x-1\.0\.whl: sha256: found [0-9a-f]{64}; expected 0{64}"):
        fetch(source, tmp_path)


def test_a_rebuild_that_differs_is_refused(tmp_path: Path) -> None:
    data = json.loads((TINY / "data.json").read_text(encoding="utf-8"))
    same(TINY / "data.json", data)
    data["packs"]["code"]["train"]["tokens_sha256"] = "0" * 64
    with pytest.raises(InputError, match=r"code\.train\.tokens_sha256: found 0{64}; expected [0-9a-f]{64}"):
        same(TINY / "data.json", data)


def test_man_pages_become_plain_text() -> None:
    page = (
        ".TH x 1\n.SH DESCRIPTION\nThe call\n.BR chdir ()\nchanges the current working directory of the\n"
        ".I calling\nprocess to the directory.\n"
        ".nf\nint left_out;\n.fi\n.TP\n.B \\-v\nSay more about what is done.\n"
    )
    assert list(manpage_paragraphs(page)) == [
        "The call chdir() changes the current working directory of the calling process to the directory."
    ]
    assert list(manpage_items(page)) == [("-v", "Say more about what is done.")]


def test_packs_are_written_read_and_joined(tmp_path: Path) -> None:
    rows = [Row(f"text {i}", "s", f"d{i}") for i in range(3)]
    write_pack(tmp_path / "a.parquet", rows)
    first = (tmp_path / "a.parquet").read_bytes()
    write_pack(tmp_path / "a.parquet", rows)
    assert (tmp_path / "a.parquet").read_bytes() == first
    assert read_pack(tmp_path / "a.parquet") == rows


def test_rows_that_are_too_long_are_left_out() -> None:
    model = tokenizer.load(TINY / "tokenizer")
    short, long = (Conversation((user("hello"), final(" word" * count)), "s", "d") for count in (5, 2000))
    part = take(iter([short, long, short]), model, None, 10_000, lambda count: None)
    assert len(part.rows) == 2
    assert part.tokens[-1] == model.token_to_id("<|return|>")
    assert part.completion_tokens == 10


# What is committed.


def test_the_committed_tokenizer_has_4096_ids_and_harmony() -> None:
    loaded = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    assert len(loaded) == 4096
    assert loaded.eos_token == "<|return|>"
    for token in SPECIAL_TOKENS:
        assert len(loaded(token, add_special_tokens=False).input_ids) == 1
    text = "<|start|>user<|message|>Add 1234 and 56.\n    Größe → 😀\t§<|end|>"
    ids = loaded(text, add_special_tokens=False).input_ids
    assert loaded.decode(ids, clean_up_tokenization_spaces=False) == text
    assert loaded.tokenize("1234") == ["1", "2", "3", "4"]


def test_the_chat_template_renders_the_same_as_the_packs() -> None:
    loaded = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "thinking": "A", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é"}}}]},
        {"role": "tool", "name": "f", "content": '{"y": 2}'},
        {"role": "assistant", "content": "F"},
    ]
    messages = [system("S"), user("U"), analysis("A"), call("f", {"x": "é"}), result("f", {"y": 2}), final("F")]
    assert loaded.apply_chat_template(chat, tokenize=False) == render(messages)
    prompt = loaded.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|start|>system<|message|>S<|end|><|start|>user<|message|>U<|end|><|start|>assistant"


@pytest.mark.parametrize("pack", PACKS)
def test_the_committed_pack_is_as_its_card_says(pack: str) -> None:
    rows = read_pack(TINY / "packs" / f"{pack}.parquet")
    expected = json.loads((TINY / "data.json").read_text(encoding="utf-8"))["packs"][pack]["heldout"]
    assert rows_sha256(rows) == expected["rows_sha256"]
    assert len(rows) == expected["conversations"] >= 400
    assert expected["completion_tokens"] >= 60_000
    model = tokenizer.load(TINY / "tokenizer")
    encodings = model.encode_batch([row.text for row in rows], add_special_tokens=False)
    assert max(len(encoding.ids) for encoding in encodings) < MAX_ROW_TOKENS
    assert sum(len(encoding.ids) + 1 for encoding in encodings) == expected["tokens"]
    for row in rows:
        assert (
            row.text.count("<|start|>")
            == row.text.count("<|message|>")
            == sum(row.text.count(f"<|{end}|>") for end in ("end", "call", "return"))
        )
        assert row.text.endswith("<|return|>")
        assert completion_spans(row.text)
        assert all(is_heldout(document) for document in row.documents), row.document
        assert "Linux-man-pages-copyleft" not in row.text
        parse_messages(row.text)


def test_the_committed_packs_are_small() -> None:
    assert sum(path.stat().st_size for path in (TINY / "packs").glob("*.parquet")) <= 4_000_000
