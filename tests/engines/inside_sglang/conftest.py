"""Tests that run inside SGLang's own environment: `.venv-sglang/bin/python -m pytest tests/engines/inside_sglang`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent.parent
sys.path[:0] = [str(HERE / "stand_ins"), str(HERE / "plugins")]

import pytest  # noqa: E402

from tests.conftest import random_mask, saved  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def plugins() -> None:
    """SGLang's own plugin loader, once, as its commands call it."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture(scope="session")
def keep24(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A mask for gpt-oss that keeps 24 of 32 experts."""
    return saved(random_mask(models["gpt-oss"], 24, seed=1), tmp_path_factory.mktemp("masks") / "keep24.json")
