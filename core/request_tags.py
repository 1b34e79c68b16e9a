"""Checking requests' tags before the engine sees them, and writing the header `X-Softprune-Tag` to where the engine passes it on.

Engines drop what they do not know from requests, but hand some free parameters of each through to the process that runs the model.
Where those stand in a body is the extension's business; here is the rest of it, as a step of an ASGI middleware.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from softprune.control import ControlError
from softprune.errors import shortened
from softprune.runtime.tags import SPANS_KEY, TAG_HEADER, TAG_KEY, Tags, check_tag, completions_of

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Places = Callable[[str, dict[str, Any]], list[tuple[dict[str, Any], str]]]
"""(path, decoded body) -> (object, key) of every place where the engine's free parameters stand, or would."""


async def with_tags(scope: Any, receive: Receive, send: Send, tags: Tags, places: Places) -> tuple[Any, Receive, Send]:
    """Read a request, and check its tags.

    Args:
        scope, receive, send: of the request.
        tags: those known; gets new ones. One that came with a request that the engine lets nobody in with (401, 403) is forgotten again.
        places: where the engine's free parameters stand.

    Returns:
        The three for the engine's own app; the header's tag stands in the body.

    Raises:
        ControlError: 400; a tag that is not allowed, one too many, or header and body name different ones.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return scope, _replaying([message], receive), send
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    in_header = _header(scope)
    # A key may also be written with \\u escapes or in UTF-16; all other bodies are left unread.
    if in_header is None and not any(sign in body for sign in (TAG_KEY.encode(), SPANS_KEY.encode(), b"\\u", b"\0")):
        return scope, _replaying([{"type": "http.request", "body": bytes(body)}], receive), send
    before = len(tags.names)
    changed = _checked(scope["path"].removeprefix(scope.get("root_path", "")), bytes(body), in_header, tags, places)
    if changed is not None:
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(changed)).encode())]}
    new = tags.names[before:]

    async def forgetting(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] in (401, 403):
            tags.names = [name for name in tags.names if name not in new]
        await send(message)

    replay = {"type": "http.request", "body": bytes(body) if changed is None else changed}
    return scope, _replaying([replay], receive), forgetting if new else send


def _checked(path: str, body: bytes, in_header: str | None, tags: Tags, places: Places) -> bytes | None:
    """Number all tags of a body; the body with the header's tag in it, or None if it stays as it is."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        if in_header is not None:
            raise ControlError(400, "invalid_tag", f"{TAG_HEADER}: found {shortened(in_header)} with a body that is no JSON object")
        return None  # the engine will say what is wrong with it
    for parent, key in places(path, data):
        holder = parent.get(key)
        own = holder.get(TAG_KEY) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            completions_of(holder.get(SPANS_KEY))
        if in_header is not None:
            if own is not None and own != in_header:
                message = f"{TAG_KEY}: found {shortened(own)} in the body and {shortened(in_header)} in {TAG_HEADER}; expected one tag"
                raise ControlError(400, "invalid_tag", message)
            if holder is None or isinstance(holder, dict):
                parent[key] = {**(holder or {}), TAG_KEY: in_header}
            own = in_header
        tags.number(own)
    return None if in_header is None else json.dumps(data).encode()


def _header(scope: Any) -> str | None:
    found = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == TAG_HEADER.lower().encode()]
    if len(set(found)) > 1:
        raise ControlError(400, "invalid_tag", f"{TAG_HEADER}: found {len(found)} of them; expected one")
    return check_tag(found[0]) if found else None


def _replaying(messages: list[Message], receive: Receive) -> Receive:
    async def replayed() -> Message:
        return messages.pop(0) if messages else await receive()

    return replayed
