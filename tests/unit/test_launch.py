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
from softprune.mask import ExpertMask, MaskModel
from softprune.mask_state import kept_after
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


def keep_state(mask: ExpertMask | None, path: Path, top_k: int = 4) -> str:
    """A state file that says so; its path as text."""
    with kept_after(str(path), mask, top_k):
        return str(path)


@pytest.mark.parametrize("flag", [True, False])
def test_a_state_file_decides_where_it_exists(models: dict[str, Path], tmp_path: Path, flag: bool) -> None:
    model = models["gpt-oss"]
    live, launched = random_mask(model, 8, seed=1), random_mask(model, 12, seed=2)
    path = saved(launched, tmp_path / "m.json") if flag else None
    request = LaunchRequest(expert_mask=path, expert_mask_state=keep_state(live, tmp_path / "state.json"))
    assert request.mask_source == str(tmp_path / "state.json")
    launch = request.resolve(read_config(model), str(model))
    assert launch.mask_hash == live.hash
    assert launch.read_mask(spec_of(read_config(model))) == live


def test_a_state_file_without_a_mask_decides_as_well(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["gpt-oss"]
    path = saved(random_mask(model, 8, top_k=2), tmp_path / "m.json")
    request = LaunchRequest(expert_mask=path, expert_mask_state=keep_state(None, tmp_path / "state.json", top_k=2))
    launch = request.resolve(read_config(model), str(model))
    assert (launch.mask_hash, launch.top_k) == (None, 2), "the top_k of the mask at launch outlives it"
    over = request.model_copy(update={"expert_top_k": 1}).resolve(read_config(model), str(model))
    assert over.top_k == 1
    keep_state(None, tmp_path / "state.json", top_k=5)
    with pytest.raises(MaskError, match="at most the model's own top_k = 4"):
        request.resolve(read_config(model), str(model))
    keep_state(None, tmp_path / "state.json", top_k=2)
    assert launch.read_mask(spec_of(read_config(model))) is None


def test_without_a_state_file_the_flag_decides(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["gpt-oss"]
    mask = random_mask(model, 8)
    path, state = saved(mask, tmp_path / "m.json"), tmp_path / "state.json"
    launch = LaunchRequest(expert_mask=path, expert_mask_state=str(state)).resolve(read_config(model), str(model))
    assert (launch.mask_hash, launch.mask_source) == (mask.hash, path)
    empty = LaunchRequest(expert_mask_state=str(state)).resolve(read_config(model), str(model))
    assert (empty.mask_hash, empty.mask_source) == (None, "no mask")
    assert not state.exists()
    # A worker that finds another state than the front end did says so.
    keep_state(random_mask(model, 9), state)
    for early in (launch, empty):
        with pytest.raises(MaskError, match="another mask"):
            early.read_mask(spec_of(read_config(model)))


def test_a_corrupt_state_file_stops_the_server(models: dict[str, Path], tmp_path: Path) -> None:
    """And does not fall back to the launch mask, which may be another model to its users."""
    model, state = models["gpt-oss"], tmp_path / "state.json"
    path = saved(random_mask(model, 8), tmp_path / "m.json")
    request = LaunchRequest(expert_mask=path, expert_mask_state=str(state))
    wrong = random_mask(models["qwen3-moe"], 8)
    for text in ("", "{", '{"format": "softprune.mask-state", "version": 1}', Path(path).read_text()):
        state.write_text(text)
        with pytest.raises(MaskError, match="state.json"):
            request.resolve(read_config(model), str(model))
    keep_state(wrong, state)
    with pytest.raises(MaskError, match="state.json: model.architecture"):
        request.resolve(read_config(model), str(model))
    keep_state(random_mask(models["gpt-oss"], 8).model_copy(update={"model": stranger(model)}), state)
    with pytest.raises(MaskError, match="state.json: model.fingerprint"):
        request.resolve(read_config(model), str(model))


def stranger(model: Path) -> MaskModel:
    """The same shape with other weights."""
    return random_mask(model, 8).model.model_copy(update={"fingerprint": "sha256:" + "0" * 64})


def test_a_state_file_needs_a_folder(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["gpt-oss"]
    (tmp_path / "file").touch()
    for folder in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(RefusedError, match="--expert-mask-state: found .* expected a file in a folder that can be written"):
            LaunchRequest(expert_mask_state=str(folder / "state.json")).resolve(read_config(model), str(model))


def test_workers_are_sent_absolute_paths(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["gpt-oss"]
    mask, live = random_mask(model, 8), random_mask(model, 9)
    saved(mask, tmp_path / "m.json")
    keep_state(live, tmp_path / "state.json")
    monkeypatch.chdir(tmp_path)
    launch = LaunchRequest(expert_mask="m.json", expert_mask_state="state.json").resolve(read_config(model), str(model))
    monkeypatch.chdir("/")
    assert (launch.expert_mask, launch.expert_mask_state) == (str(tmp_path / "m.json"), str(tmp_path / "state.json"))
    assert launch.read_mask(spec_of(read_config(model))) == live
