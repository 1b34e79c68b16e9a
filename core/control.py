"""The control API's key and its errors, the same for every engine.

Default deny: a call without softprune's own key is answered 401, whatever else the engine lets through.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path
from typing import Any

PREFIX = "/softprune/v1"
KEY_HEADER = "X-Softprune-Key"
KEY_ENV = "SOFTPRUNE_KEY"


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


def error_body(kind: str, message: str, detail: Any = None) -> dict[str, Any]:
    """Body of every error answer."""
    return {"error": {"type": kind, "message": message, "detail": detail}}
