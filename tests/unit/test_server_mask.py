"""The mask that was in force is put back, unless the block says otherwise; where it cannot be, that is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from softprune.cli import app
from softprune.errors import InputError, SoftpruneError
from softprune.server_client import ServerClient
from softprune.server_mask import mask_put_back, switch_obeyed
from tests.unit.fake_control import LAYERS, REFUSED, ServedFake, make_mask


@pytest.fixture
def fake() -> Iterator[ServedFake]:
    with ServedFake() as one:
        ServerClient(one.url, "right").put_mask(make_mask([[0, 1, 2]] * LAYERS))
        yield one


def test_put_back_or_left(fake: ServedFake) -> None:
    client, before, other = ServerClient(fake.url, "right"), fake.api.in_force, make_mask([[3, 4]] * LAYERS)

    def interrupted() -> None:
        with mask_put_back(client):
            client.put_mask(other)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert fake.api.in_force == before
    with mask_put_back(client) as restore:
        client.put_mask(other)
        restore.forget()
    assert fake.api.in_force == other


def test_what_cannot_be_put_back_is_named(fake: ServedFake) -> None:
    client, before = ServerClient(fake.url, "right"), fake.api.in_force
    assert before is not None

    def refused() -> None:
        with mask_put_back(client):
            client.switch(None)
            fake.api.switches = [REFUSED]

    with pytest.raises(SoftpruneError, match=f"NOT PUT BACK: mask {before.hash} was in force"):
        refused()


def test_a_router_that_does_not_obey(fake: ServedFake, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ServerClient(fake.url, "right")
    switch_obeyed(client, None, "none")
    assert fake.api.in_force is None
    monkeypatch.setattr(client, "verify", lambda: {"obeyed": False, "detail": "layer 1"})
    with pytest.raises(InputError, match=r"keep4: found a router that does not obey the mask \(layer 1\)"):
        switch_obeyed(client, make_mask([[3, 4]] * LAYERS), "keep4")


def test_a_recipe_without_a_server_takes_no_options_of_one(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"schema_version: 1\nkind: reap_recipe\nmodel: {{keep_n: 4}}\nscoring: {{method: reap}}\nsource: {{model_path: {tmp_path}}}\n"
    )
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["run", str(recipe), "--rewritten-url", "http://127.0.0.1:1"])
    assert result.exit_code == 2
    assert "--url: found nothing, with options that need it; expected a server" in result.output
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["run", str(recipe), "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 3  # 2 would mean INCOMPLETE
