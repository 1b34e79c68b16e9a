"""The control API's key, its errors, and what they say, the same for every engine.

Default deny: a call without softprune's own key is answered 401, whatever else the engine lets through.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from softprune.errors import InputError, MaskError, RefusedError, SoftpruneError
from softprune.mask import ExpertMask

PREFIX = "/softprune/v1"
KEY_HEADER = "X-Softprune-Key"
KEY_ENV = "SOFTPRUNE_KEY"
ENGINE_KEY_ENV = "SOFTPRUNE_ENGINE_KEY"
BODY = "request body"
"""Stands for the file's name in errors about a mask that came over HTTP."""
IN_FLIGHT = ("continue", "drain", "retract")
"""What becomes of requests that are running when a mask is switched."""


def key_file(port: int) -> Path:
    """Where a server on this machine leaves the key it generated."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "softprune" / f"{port}.key"


def server_key(port: int) -> tuple[str, Path | None]:
    """The key that a server asks for: SOFTPRUNE_KEY's (where `--softprune-key` puts its own), else a new one.

    Returns:
        The key, and the owner-readable file that holds it if it was generated here.
    """
    given = os.environ.get(KEY_ENV)
    if given:
        return given, None
    key, path = secrets.token_urlsafe(24), key_file(port)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key)
    return key, path


def bearer(engine_key: str | None) -> dict[str, str]:
    """The header by which both engines take their own API key; none without one.

    Raises:
        InputError: no HTTP header can hold it.
    """
    if engine_key is None:
        return {}
    if not (engine_key.isascii() and engine_key.isprintable()):
        raise InputError(f"--engine-key or {ENGINE_KEY_ENV}", "", "characters that no HTTP header can hold", "printable ASCII")
    return {"Authorization": f"Bearer {engine_key}"}


def client_key(port: int) -> str | None:
    """The key that a client on the same machine should send, or None if none is known."""
    given = os.environ.get(KEY_ENV)
    if given:
        return given
    try:
        return key_file(port).read_text().strip()
    except OSError:
        return None


def key_matches(sent: str, key: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(sent.encode(), key.encode())


class ControlError(SoftpruneError):
    """A call that the control API answers with an error; the old state stays.

    Attributes:
        status: HTTP status: 400, 404, 409 or 413; 500 if something failed that should not.
        kind: what went wrong, in one word, for programs.
        detail: further facts; JSON-ready.
    """

    def __init__(self, status: int, kind: str, message: str, detail: Any = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.detail = status, kind, detail

    @property
    def answer(self) -> dict[str, Any]:
        """As it travels between processes; see `raise_answer`."""
        return {"status": self.status, "kind": self.kind, "message": str(self), "detail": self.detail}

    @classmethod
    def of(cls, error: Exception) -> ControlError:
        """An error as the control API answers it."""
        if isinstance(error, ControlError):
            return error
        if isinstance(error, MaskError):
            detail = {"file": error.file, "field": error.field, "found": error.found, "expected": error.expected}
            return cls(400, "invalid_mask", str(error), detail)
        if isinstance(error, RefusedError):
            return cls(409, "refused", str(error))
        return cls(500, "failed", f"{type(error).__name__}: {error}")


def raise_answer(answer: dict[str, Any]) -> NoReturn:
    """Raise the ControlError that another process sent."""
    raise ControlError(answer["status"], answer["kind"], answer["message"], answer["detail"])


def refusal_among(votes: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Of every process's answer to "can you put this mask in force?", the first refusal, or None if all can."""
    for rank, vote in enumerate(votes):
        if vote is not None:
            return {**vote, "message": f"process {rank}: {vote['message']}"} if len(votes) > 1 else vote
    return None


def check_top_k(mask: ExpertMask, running: int) -> None:
    """See that a mask asks for no other top_k than the one that kernels and graphs were built for.

    Raises:
        ControlError: 409 top_k_is_fixed_at_launch.
    """
    asked = mask.top_k if isinstance(mask.top_k, list) else [mask.top_k]
    other = [k for k in asked if k not in (None, running)]
    if other:
        message = f"{BODY}: top_k: found {other[0]}; expected {running}, which this server was started with, or null"
        raise ControlError(409, "top_k_is_fixed_at_launch", message, {"found": other[0], "expected": running})


def error_body(kind: str, message: str, detail: Any = None) -> dict[str, Any]:
    """Body of every error answer."""
    return {"error": {"type": kind, "message": message, "detail": detail}}
