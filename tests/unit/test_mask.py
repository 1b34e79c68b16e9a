"""Every rule of the mask file, and the error that breaking it gives."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from softprune import mask as mask_file
from softprune.checkpoint.families import ModelSpec
from softprune.errors import MaskError
from softprune.mask import ExpertMask

SPEC = ModelSpec("GptOssForCausalLM", (0, 1, 2), 8, 4)
FINGERPRINT = "sha256:" + "a" * 64
GOOD: dict[str, Any] = {
    "format": "softprune.expert-mask",
    "version": 1,
    "model": {"architecture": "GptOssForCausalLM", "num_layers": 3, "num_experts": 8, "top_k": 4, "fingerprint": FINGERPRINT},
    "keep": [[0, 1, 2, 3, 7], None, [1, 2, 3, 4]],
    "top_k": None,
    "provenance": {"method": "random"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one field replaced, or removed if the value is ..."""
    data = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    owner: Any = data
    for part in parents:
        owner = owner[int(part) if part.isdigit() else part]
    key: Any = int(last) if last.isdigit() else last
    if value is ...:
        del owner[key]
    else:
        owner[key] = value
    return data


def error(data: Any) -> MaskError:
    with pytest.raises(MaskError) as caught:
        ExpertMask.parse(data, "m.json")
    assert caught.value.file == "m.json"
    return caught.value


def test_a_good_mask() -> None:
    mask = ExpertMask.parse(GOOD, "m.json")
    assert mask.num_kept == [5, 8, 4]
    assert mask.pruned(0) == [4, 5, 6]
    assert mask.pruned(1) == []
    assert [mask.layer_top_k(i) for i in range(3)] == [4, 4, 4]
    mask.check_model(SPEC, "m.json")
    assert mask.check_fingerprint(FINGERPRINT, "m.json") is None


def test_unsorted_ids_are_sorted() -> None:
    assert ExpertMask.parse(changed("keep.0", [7, 3, 0, 2, 1]), "m.json").keep[0] == [0, 1, 2, 3, 7]


def test_a_file_survives_a_round_trip(tmp_path: Path) -> None:
    mask = ExpertMask.parse(GOOD, "m.json")
    mask.save(tmp_path / "new" / "m.json")
    assert mask_file.load(tmp_path / "new" / "m.json") == mask
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.json"]


BROKEN = [
    ("format", "other", "format", "'other'"),
    ("format", ..., "format", "None"),
    ("version", 2, "version", "2"),
    ("version", True, "version", "True"),
    ("version", "1", "version", "'1'"),
    ("keep", ..., "keep", "nothing"),
    ("keep", "all", "keep", "'all'"),
    ("keep", [None, None], "keep", "2 layers"),
    ("keep.0", [0, 1, 1, 2, 3], "keep[0]", "expert id 1 more than once"),
    ("keep.0", [-1, 1, 2, 3], "keep[0]", "expert id -1"),
    ("keep.2", [1, 2, 3, 8], "keep[2]", "expert id 8"),
    ("keep.2", [1, 2, 3], "keep[2]", "3 experts kept"),
    ("keep.2", [], "keep[2]", "0 experts kept"),
    ("keep.0", [0, 1, 2, "3"], "keep[0][3]", "'3'"),
    ("keep.0", [0, 1, 2, 3.0], "keep[0][3]", "3.0"),
    ("keep.0", [0, 1, 2, True], "keep[0][3]", "True"),
    ("top_k", 5, "top_k", "5"),
    ("top_k", 0, "top_k", "0"),
    ("top_k", [4, 4], "top_k", "a list of 2"),
    ("top_k", [4, 5, 4], "top_k[1]", "5"),
    ("top_k", "4", "top_k", "'4'"),
    ("topk", 4, "topk", "an unknown field"),
    ("model.architecture", ..., "model.architecture", "nothing"),
    ("model.num_layers", 0, "model.num_layers", "0"),
    ("model.top_k", 9, "model.top_k", "9"),
    ("model.fingerprint", "abc", "model.fingerprint", "'abc'"),
    ("model.extra", 1, "model.extra", "an unknown field"),
    ("provenance", [], "provenance", "[]"),
]


@pytest.mark.parametrize(("path", "value", "field", "found"), BROKEN)
def test_broken_rules_are_named(path: str, value: Any, field: str, found: str) -> None:
    caught = error(changed(path, value))
    assert (caught.field, caught.found) == (field, found)
    assert caught.expected


def test_top_k_lets_fewer_stay() -> None:
    data = changed("keep.2", [1, 2])
    data["top_k"] = 2
    assert ExpertMask.parse(data, "m.json").num_kept == [5, 8, 2]


@pytest.mark.parametrize("data", [[], "mask", 1, None, True])
def test_other_json_is_refused(data: Any) -> None:
    assert "an object with" in error(data).expected


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"format": ', "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"provenance": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested too deep"),
        (b" " * 16_000_001, "over 16 MB"),
        (b'{"keep": [], "keep": []}', "this key twice"),
        (b"", "no valid JSON"),
    ],
    ids=["cut", "not UTF-8", "deep array", "deep object", "large", "twice", "empty"],
)
def test_files_that_are_no_json(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(MaskError, match=found):
        mask_file.load(tmp_path / "m.json")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match="No such file"):
        mask_file.load(tmp_path / "m.json")
    with pytest.raises(MaskError, match="Is a directory"):
        mask_file.load(tmp_path)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (ModelSpec("Qwen3MoeForCausalLM", (0, 1, 2), 8, 4), "model.architecture"),
        (ModelSpec("GptOssForCausalLM", (0, 1), 8, 4), "model.num_layers"),
        (ModelSpec("GptOssForCausalLM", (0, 1, 2), 16, 4), "model.num_experts"),
        (ModelSpec("GptOssForCausalLM", (0, 1, 2), 8, 2), "model.top_k"),
    ],
)
def test_masks_of_other_models(spec: ModelSpec, field: str) -> None:
    with pytest.raises(MaskError) as caught:
        ExpertMask.parse(GOOD, "m.json").check_model(spec, "m.json")
    assert caught.value.field == field


def test_fingerprints() -> None:
    mask, other = ExpertMask.parse(GOOD, "m.json"), "sha256:" + "b" * 64
    with pytest.raises(MaskError, match="expert-mask-force"):
        mask.check_fingerprint(other, "m.json")
    assert "forced" in (mask.check_fingerprint(other, "m.json", force=True) or "")
    unknown = ExpertMask.parse(changed("model.fingerprint", None), "m.json")
    assert "null" in (unknown.check_fingerprint(other, "m.json") or "")


def test_the_hash_is_of_what_a_mask_does() -> None:
    def digest(path: str, value: Any) -> str:
        return ExpertMask.parse(changed(path, value), "m.json").hash

    same = ExpertMask.parse(GOOD, "m.json").hash
    assert digest("keep.1", list(range(8))) == same
    assert digest("top_k", [4, 4, 4]) == same
    assert digest("provenance", {}) == same
    assert digest("model.fingerprint", None) == same
    assert len({same, digest("top_k", 2), digest("keep.2", None), digest("keep.2", [0, 2, 3, 4])}) == 4


def test_dump_is_one_line_a_layer() -> None:
    text = ExpertMask.parse(GOOD, "m.json").dump()
    assert json.loads(text) == GOOD
    assert "  [0, 1, 2, 3, 7],\n  null,\n" in text
