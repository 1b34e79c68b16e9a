"""The one vLLM server that engine tests share. `make test` runs this folder; tests that need more boots belong in tests/evidence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from softprune.mask import ExpertMask
from tests.conftest import random_mask, saved
from tests.engines.harness import VllmServer


@dataclass
class Masked:
    """A running server and the mask that it was started with."""

    server: VllmServer
    mask: ExpertMask


@pytest.fixture(scope="session")
def masked(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Masked]:
    """gpt-oss, 24 of 32 experts kept, with the route probe, and with the call that takes ids."""
    folder = tmp_path_factory.mktemp("server")
    mask = random_mask(models["gpt-oss"], 24, seed=11)
    path = saved(mask, folder / "keep24.json")
    flags = ("--expert-mask", path, "--softprune-debug-routes", "--enable-scale-out")
    with VllmServer(models["gpt-oss"], *flags, log=folder / "server.log") as server:
        server.wait_ready()
        yield Masked(server, mask)
