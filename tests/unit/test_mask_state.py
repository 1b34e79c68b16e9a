"""The file that keeps a live mask across restarts."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from softprune.errors import MaskError
from softprune.mask_state import kept_after, read_state
from tests.unit.fake_control import make_mask

MASK = make_mask([[0, 1, 2], None, [3, 4]])


def test_a_mask_and_no_mask_come_back(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    for mask in (MASK, None, MASK.model_copy(update={"provenance": {"why": "ü\ud800\n"}})):
        with kept_after(str(state), mask, 4):
            pass
        assert read_state(str(state)) == (mask, 4)
        document = json.loads(state.read_text())
        assert (document["format"], document["version"]) == ("softprune.mask-state", 1)
    assert stat.S_IMODE(state.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [state]


def test_it_is_written_once_the_block_has_ended_well(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    with kept_after(str(state), MASK, 4):
        assert not state.exists()
    before = state.read_bytes()
    stop = kept_after(str(state), None, 4)
    stop.__enter__()
    assert state.read_bytes() == before
    assert not stop.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert state.read_bytes() == before
    assert list(tmp_path.iterdir()) == [state]


def test_where_it_cannot_be_written_the_block_does_not_run(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "state.json", Path("/dev/null/state.json")):
        ran = False
        with pytest.raises(OSError), kept_after(str(path), MASK, 4):
            ran = True
        assert not ran


def test_without_a_file_nothing_is_kept() -> None:
    with kept_after(None, MASK, 4):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ('{"format": "softprune.mask-state", "version": 1, "mask": {', "no valid JSON"),
        ("null", "found 'NoneType'; expected an object"),
        ("[]", "found 'list'; expected an object"),
        (MASK.dump(), "found ('softprune.expert-mask', 1, False); expected an object"),
        ('{"format": "softprune.mask-state", "version": 2, "mask": null}', "found ('softprune.mask-state', 2, True)"),
        ('{"format": "softprune.mask-state", "version": 1}', "found ('softprune.mask-state', 1, False)"),
        ('{"format": "softprune.mask-state", "version": 1, "mask": 0}', "a JSON number"),
        ('{"format": "softprune.mask-state", "version": 1, "mask": null, "mask": null}', "this key twice"),
        (f'{{"format": "softprune.mask-state", "version": 1, "mask": {MASK.dump().replace("[3, 4]", "[3]")}}}', "keep[2]: found 1 expert"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    state = tmp_path / "state.json"
    state.write_text(text)
    with pytest.raises(MaskError) as caught:
        read_state(str(state))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(state))


def test_a_missing_file_is_an_error_here(tmp_path: Path) -> None:
    """Whether it decides is `LaunchRequest.mask_source`'s to say."""
    with pytest.raises(MaskError, match="No such file"):
        read_state(str(tmp_path / "none.json"))
