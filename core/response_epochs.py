"""Naming the mask epochs in an engine's answers, on their way out.

Engines build answers from models of their own that take no further field, so it is put into the bytes:
`"softprune": {"epochs": [0]}` at the end of a body or of a stream's last chunk, and in `meta_info` in SGLang's native API.
Requests are found by the id that the answer carries; a chunk of one that is still running names none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from softprune.runtime.epochs import RequestIndex

PATHS = ("/v1/completions", "/v1/chat/completions", "/inference/v1/generate", "/generate")
"""Calls whose answers name their epochs; for all others, `GET requests/{id}` does."""

_META_INFO = re.compile(rb'"meta_info":\s?\{(?="id":\s?"([^"\\]+)")')
_ID = re.compile(rb'\{"(?:request_)?id":\s?"([^"\\]+)"')

Send = Callable[[dict[str, Any]], Awaitable[None]]


def naming_epochs(send: Send, finished: RequestIndex) -> Send:
    """An ASGI `send` that names the epochs of finished requests in every answer."""
    held: dict[str, Any] | None = None
    length: int | None = None
    answered: set[str] = set()

    async def named(message: dict[str, Any]) -> None:
        nonlocal held, length
        if message["type"] == "http.response.start":
            length = _content_length(message["headers"])
            if length is not None:
                held = message  # it may grow with the body
                return
        if message["type"] == "http.response.body":
            body = message.get("body", b"")
            # What has a length is named in one piece or not at all: after the first piece the length has been sent.
            named_body = name_epochs(body, finished, answered) if body and length in (None, len(body)) else body
            if held is not None:
                if len(named_body) != len(body):
                    held = {**held, "headers": _lengthened(held["headers"], len(named_body) - len(body))}
                await send(held)
                held = None
            message = {**message, "body": named_body}
            if not message.get("more_body"):
                for request_id in answered:
                    finished.forget(request_id)  # a client may use an id again
        await send(message)

    return named


def name_epochs(body: bytes, finished: RequestIndex, answered: set[str]) -> bytes:
    """A whole JSON body, or some events of a stream, with the epochs of the finished requests in it.

    Args:
        body: bytes of an answer.
        finished: epochs by request id.
        answered: gets the ids that were named.
    """
    if b'"meta_info"' in body:
        return _META_INFO.sub(lambda match: match[0] + _field(match[1], finished, answered, b","), body)
    return b"\n\n".join(_event(event, finished, answered) for event in body.split(b"\n\n"))


def _event(event: bytes, finished: RequestIndex, answered: set[str]) -> bytes:
    start = len(b"data: ") if event.startswith(b"data: ") else 0
    match = _ID.match(event, start)
    end = event.rstrip()
    if match is None or not end.endswith(b"}"):
        return event
    field = _field(match[1], finished, answered)
    return end[:-1] + b"," + field + b"}" + event[len(end) :] if field else event


def _field(request_id: bytes, finished: RequestIndex, answered: set[str], after: bytes = b"") -> bytes:
    name = request_id.decode("utf-8", "replace")
    epochs = finished.epochs(name)
    if not epochs:
        return b""
    answered.add(name)
    return b'"softprune":' + json.dumps({"epochs": epochs}, separators=(",", ":")).encode() + after


def _content_length(headers: Any) -> int | None:
    return next((int(value) for name, value in headers if name.lower() == b"content-length"), None)


def _lengthened(headers: Any, more: int) -> list[tuple[bytes, bytes]]:
    return [(name, str(int(value) + more).encode() if name.lower() == b"content-length" else value) for name, value in headers]
