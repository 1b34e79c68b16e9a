"""Epochs put into an engine's answers on their way out: where they belong, and not one byte changed elsewhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from softprune.response_epochs import name_epochs, naming_epochs
from softprune.runtime.epochs import RequestIndex
from softprune.vllm_ext.seams import call_ids

JSON = [(b"content-type", b"application/json")]


@pytest.fixture
def finished() -> RequestIndex:
    index = RequestIndex(names=call_ids)
    for request_id, epochs in (
        ("cmpl-1-0-f00df00d", [0]),
        ("cmpl-1-1-f00df00d", [0, 2]),
        ("chatcmpl-2-abcdabcd", [3]),
        ("generate-tokens-7b-abcdabcd", [5]),
        ("a1", [1]),
        ("b2", [1, 4]),
    ):
        index.add(request_id, epochs)
    return index


def through(messages: list[dict[str, Any]], finished: RequestIndex) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        named = naming_epochs(send, finished)
        for message in messages:
            await named(message)

    asyncio.run(run())
    return sent


def answer(*bodies: bytes, headers: list[tuple[bytes, bytes]] = JSON) -> list[dict[str, Any]]:
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    last = len(bodies) - 1
    return [start, *({"type": "http.response.body", "body": body, "more_body": i < last} for i, body in enumerate(bodies))]


def sized(body: bytes) -> list[tuple[bytes, bytes]]:
    return [*JSON, (b"Content-Length", str(len(body)).encode())]


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_whole_body(finished: RequestIndex, separators: tuple[str, str]) -> None:
    document = {"id": "cmpl-1", "choices": [{"text": 'a "} \n\n data: {"id":"b2"}'}], "usage": {"total_tokens": 3}}
    body = json.dumps(document, separators=separators).encode()
    start, sent = through(answer(body, headers=sized(body)), finished)
    assert json.loads(sent["body"]) == {**document, "softprune": {"epochs": [0, 2]}}
    assert dict(start["headers"])[b"Content-Length"] == str(len(sent["body"])).encode()
    assert start["headers"][0] == JSON[0]


def test_the_call_that_takes_ids_names_its_request_otherwise(finished: RequestIndex) -> None:
    body = b'{"request_id":"generate-tokens-7b","choices":[],"prompt_logprobs":null}'
    _, sent = through(answer(body, headers=sized(body)), finished)
    assert json.loads(sent["body"])["softprune"] == {"epochs": [5]}


def test_a_body_in_front_of_an_empty_one(finished: RequestIndex) -> None:
    """As Starlette's own middleware passes bodies on."""
    body = b'{"id":"chatcmpl-2","choices":[]}'
    start, sent, end = through(answer(body, b"", headers=sized(body)), finished)
    assert json.loads(sent["body"])["softprune"] == {"epochs": [3]}
    assert dict(start["headers"])[b"Content-Length"] == str(len(sent["body"])).encode()
    assert end == {"type": "http.response.body", "body": b"", "more_body": False}


def test_a_sized_body_in_parts_is_as_long_as_its_header_says(finished: RequestIndex) -> None:
    events = [b'data: {"id":"cmpl-1","choices":[]}\n\n', b'data: {"id":"chatcmpl-2","choices":[]}\n\n']
    start, *bodies = through(answer(*events, headers=sized(b"".join(events))), finished)
    assert int(dict(start["headers"])[b"Content-Length"]) == sum(len(message["body"]) for message in bodies)


def test_a_stream(finished: RequestIndex) -> None:
    """Several events in one message, an empty message, a usage chunk, the end mark; the start goes out with the first byte."""
    running, done = b'data: {"id":"cmpl-9","choices":[{"text":"x"}]}', b'data: {"id": "cmpl-1", "choices": [{"text": "y"}]}'
    usage, end = b'data: {"id":"cmpl-1","choices":[],"usage":{"total_tokens":3}}', b"data: [DONE]"
    messages = answer(running + b"\n\n", running + b"\n\n" + done + b"\n\n", b"", usage + b"\n\n" + end + b"\n\n", b"", headers=[])
    sent = through(messages, finished)
    named = b',"softprune":{"epochs":[0,2]}}'
    assert [message["type"] for message in sent] == [message["type"] for message in messages]
    assert [message.get("body") for message in sent[1:]] == [
        running + b"\n\n", running + b"\n\n" + done[:-1] + named + b"\n\n", b"", usage[:-1] + named + b"\n\n" + end + b"\n\n", b"",
    ]  # fmt: skip
    assert sent[0] == messages[0]


def test_meta_info_alone_and_in_lists(finished: RequestIndex) -> None:
    one = {"text": 'says "meta_info":{"id":"b2"}', "meta_info": {"id": "a1", "finish_reason": {"type": "stop"}}}
    two = {"text": "", "meta_info": {"id": "b2", "completion_tokens": 3}}
    three = {"text": "", "meta_info": {"id": "unknown"}}
    with_one = {**one, "meta_info": {"softprune": {"epochs": [1]}, **one["meta_info"]}}  # type: ignore[dict-item]
    with_two = {**two, "meta_info": {"softprune": {"epochs": [1, 4]}, **two["meta_info"]}}  # type: ignore[dict-item]
    for separators in ((",", ":"), (", ", ": ")):
        body = json.dumps([one, two, three], separators=separators).encode()
        assert json.loads(name_epochs(body, finished, set())) == [with_one, with_two, three]
        event = b"data: " + json.dumps(one, separators=separators).encode() + b"\n\n"
        named = name_epochs(event, finished, set())
        assert named.startswith(b"data: ")
        assert named.endswith(b"\n\n")
        assert json.loads(named[6:]) == with_one


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\n\n",
        b"data: [DONE]\n\n",
        b": ping\n\n",
        b'{"id":"unknown","choices":[]}',
        b'{"error":{"message":"no","id":"a1"}}',
        b'{"object":"list","id":"a1"}',
        b'{"id":"cmpl-1","choices":[',
        b'data: {"id":"cmpl-1","choices":[{"text":"half',
        b'{"id":17}',
        b'{"id":"a\\"1"}',
        b'{"text":"\\"meta_info\\":{\\"id\\":\\"a1\\"}"}',
        b'{"meta_info":{"weight_version":"default","id":"a1"}}',
        b"<html>\xff\xfe\x00</html>",
        b'[{"id":"cmpl-1"}]',
    ],
)
def test_bytes_stay_where_nothing_is_known(finished: RequestIndex, body: bytes) -> None:
    assert name_epochs(body, finished, set()) == body
    messages = answer(body, headers=sized(body))
    assert through(messages, finished) == messages


def test_other_messages_pass(finished: RequestIndex) -> None:
    messages = [{"type": "http.response.debug", "info": {}}, *answer(b'{"id":"x"}'), {"type": "http.response.trailers", "headers": []}]
    assert through(messages, finished) == messages


def test_a_part_of_a_sized_body_is_never_taken_for_the_whole(finished: RequestIndex) -> None:
    body = b'{"id":"cmpl-1","choices":[{"index":0},{"index":1}]}'
    parts = body[:37], body[37:]
    assert parts[0].endswith(b"}")
    messages = answer(*parts, headers=sized(body))
    assert through(messages, finished) == messages
