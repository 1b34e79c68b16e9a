"""What `softprune stats start` asks of a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from softprune.cli import app
from softprune.server_client import ServerClient

STATE: dict[str, Any] = {"mode": "reap", "collecting": True, "masks": [], "tags": ["default"]}


def start(monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[int, str, list[Any]]:
    asked: list[Any] = []

    def answering(client: ServerClient, method: str, path: str, body: bytes | None = None, timeout: float | None = None) -> Any:
        assert (method, path) == ("POST", "/stats/start")
        asked.append(json.loads(body or b""))
        return STATE

    monkeypatch.setattr(ServerClient, "_object", answering)
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["stats", "start", "--url", "http://127.0.0.1:1", "--key", "k", *flags])
    return result.exit_code, result.output, asked


@pytest.mark.parametrize(
    ("flags", "body"),
    [
        ("", {"mode": "router"}),
        ("--mode reap --sample 1/4", {"mode": "reap", "sample": 4}),
        ("--mode eaft --sample 1/1 --attribution target", {"mode": "eaft", "sample": 1, "attribution": "target"}),
        ("--shadow 1/64", {"mode": "router", "sample": 64, "shadow": True}),
        ("--mode eaft --sample 1/8 --shadow 1/8", {"mode": "eaft", "sample": 8, "shadow": True}),
        ("--mode reap --shadow 1/8", {"mode": "reap", "sample": 8, "shadow": True}),
    ],
)
def test_flags(monkeypatch: pytest.MonkeyPatch, flags: str, body: Any) -> None:
    code, output, asked = start(monkeypatch, *flags.split())
    assert (code, asked) == (0, [body]), output
    assert "collecting reap" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mode all", "'all' is not one of 'router', 'reap', 'eaft'"),
        ("--mode reap --sample 1/8 --shadow 1/4", "--shadow: found 1/4; expected 1/8, as --sample"),
        ("--shadow 4", "--shadow: found '4'; expected 1/N"),
        ("--sample 2/4", "--sample: found '2/4'; expected 1/N"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, flags: str, message: str) -> None:
    code, output, asked = start(monkeypatch, *flags.split())
    assert (code, asked) == (2, [])
    assert message in " ".join(output.split())
