"""What a server is asked for, checked before the engine is configured."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import pytest

from softprune import control
from softprune.checkpoint.families import read_config, spec_of
from softprune.errors import MaskError, RefusedError, SeamError
from softprune.launch import LaunchRequest
from tests.conftest import random_mask, saved


def test_resolve_fills_in_what_follows(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["gpt-oss"]
    path = saved(random_mask(model, 8, top_k=2), tmp_path / "m.json")
    request = LaunchRequest(expert_mask=path).resolve(read_config(model), str(model))
    assert (request.top_k, request.model_top_k) == (2, 4)
    assert request.read_mask(spec_of(read_config(model))) is not None


def test_a_mask_that_changes_after_the_check_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["gpt-oss"]
    path = saved(random_mask(model, 8), tmp_path / "m.json")
    request = LaunchRequest(expert_mask=path).resolve(read_config(model), str(model))
    saved(random_mask(model, 9), tmp_path / "m.json")
    with pytest.raises(MaskError, match="another mask"):
        request.read_mask(spec_of(read_config(model)))
    os.unlink(path)
    with pytest.raises(MaskError, match="No such file"):
        request.read_mask(spec_of(read_config(model)))


@pytest.mark.parametrize(
    "error", [MaskError("m.json", "keep[0]", "3", "4"), SeamError("a.seam", "vLLM 1", "it is gone"), RefusedError("no")]
)
def test_errors_survive_the_way_between_processes(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(RefusedError, match="here: expert_msk: found 'x'"):
        LaunchRequest.parse({"expert_msk": "x"}, "here")


def test_a_generated_key_is_its_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv(control.KEY_ENV, raising=False)
    key, path = control.server_key(8000)
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert control.client_key(8000) == key
    assert control.client_key(8001) is None
    assert control.server_key(8000)[0] != key
    monkeypatch.setenv(control.KEY_ENV, "mine")
    assert control.server_key(8000) == ("mine", None)
    assert control.client_key(8000) == "mine"
