"""A statistics file comes back as it was written, and whatever is wrong with one is refused by name."""

from __future__ import annotations

import copy
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from softprune.stats import file as stats_file
from softprune.stats import header_rules
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics, read, read_header, write
from softprune.stats.header import FORMAT, MaskEpoch
from softprune.stats.layout import FINE, SPECS, rounded, shapes
from tests.unit.stats_of import ALL, MODEL, collected, header

GOOD = collected("run-1", ("default", "code"))


def same(a: Statistics, b: Statistics) -> bool:
    return (
        a.header == b.header
        and a.tensors.keys() == b.tensors.keys()
        and all(a[name].tobytes() == b[name].tobytes() and a[name].dtype == b[name].dtype for name in a.tensors)
    )


def altered(tmp_path: Path, change: Callable[[dict[str, Any], dict[str, NDArray[Any]]], None]) -> Path:
    """GOOD on disk, with header and tensors changed behind softprune's back."""
    head, tensors = json.loads(GOOD.header.dump()), {name: values.copy() for name, values in GOOD.tensors.items()}
    change(head, tensors)
    path = tmp_path / "s.safetensors"
    save_file(tensors, path, {FORMAT: json.dumps(head)})
    return path


def refusal(path: Path) -> StatisticsError:
    with pytest.raises(StatisticsError) as caught:
        read(path)
    assert caught.value.file == str(path)
    return caught.value


@pytest.mark.parametrize("modes", [ALL, ("router",), ("reap",), ("router", "eaft")])
def test_round_trip(tmp_path: Path, modes: Any) -> None:
    statistics = collected("run-1", ("default", "tool use", "code"), modes)
    for name in ("a", "b"):
        write(statistics, tmp_path / name)
    assert same(read(tmp_path / "a"), statistics)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    assert set(statistics.tensors) == {
        name for name, spec in SPECS.items() if spec.mode in modes or (spec.mode == "shadow" and "router" in modes)
    }
    assert len(list(tmp_path.iterdir())) == 2


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    write(GOOD, tmp_path / "s.safetensors")
    plain = load_file(tmp_path / "s.safetensors")
    assert plain["router.count"].shape == (2, 2, 3, 12)
    assert plain["eaft.hist"].shape == (2, 2, 160, 120)


def test_only_what_is_asked_for_is_loaded(tmp_path: Path) -> None:
    write(GOOD, tmp_path / "s")
    part = read(tmp_path / "s", {"router.count", "router.shadow_count", "of no file"})
    assert set(part.tensors) == {"router.count", "router.shadow_count"}
    assert read_header(tmp_path / "s") == GOOD.header
    with pytest.raises(StatisticsError, match="no such tensor"):
        write(part, tmp_path / "t")


def test_sums_are_rounded_to_their_quantum_and_no_further() -> None:
    values = np.array([0.1, 1 / 3, 0.0, -0.0, 1e6 + 1e-9])
    once = rounded(SPECS["router.gate_sum"], values)
    assert np.abs(once - values).max() <= FINE / 2
    assert rounded(SPECS["router.gate_sum"], once).tobytes() == once.tobytes()
    assert not np.signbit(once).any()
    raw = {**GOOD.tensors, "router.gate_sum": GOOD["router.gate_sum"] * (1 + 1e-12)}
    assert np.allclose(Statistics.of(GOOD.header, raw)["router.gate_sum"], GOOD["router.gate_sum"])


def test_float32_and_int32_of_a_device_are_taken() -> None:
    small = {name: values.astype(np.int32 if SPECS[name].quantum is None else np.float32) for name, values in GOOD.tensors.items()}
    taken = Statistics.of(GOOD.header, small)
    assert taken["router.count"].dtype == np.int64
    assert np.allclose(taken["reap.gate_norm_sum"], GOOD["reap.gate_norm_sum"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("router.count", GOOD["router.count"] / 2, "dtype float64"),
        ("router.gate_sum", np.full(GOOD["router.gate_sum"].shape, np.nan), "NaN"),
        ("router.gate_sum", GOOD["router.gate_sum"][:, 0], "shape [2, 3, 12]"),
        ("router.nonsense", GOOD["router.count"], "a tensor that the header does not call for"),
    ],
)
def test_raw_sums_are_checked(name: str, values: NDArray[Any], found: str) -> None:
    with pytest.raises(StatisticsError) as caught:
        Statistics.of(GOOD.header, {**GOOD.tensors, name: values})
    assert caught.value.field == name
    assert found in caught.value.found


@pytest.mark.parametrize(
    ("path", "value", "field", "found"),
    [
        ("format", "softprune.expert-mask", "format", "'softprune.expert-mask'"),
        ("version", 2, "version", "2"),
        ("version", True, "version", "True"),
        ("runs", [], "runs", "[]"),
        ("runs.0.id", "", "runs[0].id", "''"),
        ("runs.0.started", "yesterday", "runs[0].started", "'yesterday'"),
        ("runs.0.nonsense", 1, "runs[0].nonsense", "an unknown field"),
        ("runs.0.modes", ["router"], "modes", "['router', 'reap', 'eaft']"),
        ("model.fingerprint", None, "model.fingerprint", "null"),
        ("model.top_k", 13, "model.top_k", "13"),
        ("model.num_layers", 4, "epochs[0].num_kept", "3 numbers"),
        ("epochs", [], "epochs", "[]"),
        ("epochs.0.run", "run-2", "epochs[0].run", "'run-2'"),
        ("epochs.0.num_kept", [12, 11, 12], "epochs[0].num_kept", "[12, 11, 12]"),
        ("epochs.0.top_k", [4, 0, 4], "epochs[0].top_k", "[4, 0, 4]"),
        ("tags", ["code", "default"], "tags", "['code']"),
        ("tags", ["default", "default"], "tags", "a tag twice"),
        ("tags", ["default", "x" * 10_000], "tags[1]", "10000 characters"),
        ("tags", ["default", "a\x1b[31m"], "tags[1]", r"'a\x1b[31m'"),
        ("tags", ["default"], "tokens", "['code', 'default']"),
        ("tokens.code.prefill", -1, "tokens.code.prefill", "-1"),
        ("sampling.reap", 0, "sampling.reap", "0"),
        ("sampling", {"reap": 16}, "sampling.eaft", "None"),
        ("confidence_bins", None, "confidence_bins", "None"),
        ("eaft", None, "eaft", "None"),
        ("data_sets.0.hashes", ["abc"], "data_sets[0].hashes[0]", "'abc'"),
        ("eaft.grid.log10_p", [-8.0, -8.0, 0.0], "eaft.grid.log10_p", "[-8.0, -8.0, 0.0]"),
        ("eaft.plane.p_max", float("nan"), "eaft.plane.p_max", "nan"),
    ],
)
def test_headers_that_break_a_rule(tmp_path: Path, path: str, value: Any, field: str, found: str) -> None:
    def change(head: dict[str, Any], _: dict[str, NDArray[Any]]) -> None:
        owner: Any = head
        *parents, last = path.split(".")
        for part in parents:
            owner = owner[int(part) if part.isdigit() else part]
        owner[last] = value

    error = refusal(altered(tmp_path, change))
    assert (error.field, error.found) == (field, found)
    assert error.expected


def put(name: str, index: Any, value: Any) -> Callable[[dict[str, Any], dict[str, NDArray[Any]]], None]:
    def change(_: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> None:
        tensors[name][index] = value

    return change


def swap(name: str, make: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[dict[str, Any], dict[str, NDArray[Any]]], None]:
    def change(_: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> None:
        tensors[name] = make(tensors[name])

    return change


UNUSED = tuple(int(i) for i in np.argwhere(GOOD["router.count"] == 0)[0])


@pytest.mark.parametrize(
    ("change", "field", "found"),
    [
        (put("router.count", (0, 0, 0, 0), -1), "router.count", "a count of -1"),
        (put("eaft.hist", (1, 1, 159, 119), 2**60), "eaft.hist", f"a count of {2**60}"),
        (put("router.gate_sum", (0, 0, 0, 0), np.nan), "router.gate_sum", "nan"),
        (put("reap.norm_sum", (0, 0, 0), np.inf), "reap.norm_sum", "inf"),
        (put("eaft.nll_sum", (0, 0), -2.0), "eaft.nll_sum", "a sum of -2.0"),
        (put("eaft.p_sum", (0, 0), 0.1), "eaft.p_sum", "0.1"),
        (put("router.gate_sum", UNUSED, 1.0), "router.gate_sum", "a sum where nothing was counted"),
        (put("router.coactivation", (0, 1, 5, 2), 1), "router.coactivation", "a pair (i, j) with i > j"),
        (put("router.coactivation", (0, 1, 5, 5), 10**6), "router.coactivation", "a diagonal that differs from router.count"),
        (swap("router.count", lambda v: v[..., :11]), "router.count", "shape [2, 2, 3, 11]"),
        (swap("router.count", lambda v: v[0]), "router.count", "shape [2, 3, 12]"),
        (swap("router.count", lambda v: v.astype(np.int32)), "router.count", "dtype I32"),
        (swap("router.gate_sum", lambda v: v.astype(np.float32)), "router.gate_sum", "dtype F32"),
        (lambda _, tensors: tensors.pop("router.confidence"), "router.confidence", "no such tensor"),
        (lambda _, tensors: tensors.update(extra=np.zeros(1)), "extra", "a tensor that the header does not call for"),
    ],
)
def test_tensors_that_break_a_rule(tmp_path: Path, change: Any, field: str, found: str) -> None:
    error = refusal(altered(tmp_path, change))
    assert (error.field, error.found) == (field, found)


def test_files_that_are_none(tmp_path: Path, models: dict[str, Path]) -> None:
    assert refusal(tmp_path / "missing").found == "No such file or directory"
    assert refusal(tmp_path).found == "Is a directory"
    write(GOOD, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for cut in (0, 4, 8, 100, 20_000, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        assert "no whole safetensors file" in refusal(tmp_path / "cut").found
    (tmp_path / "cut").write_bytes(data + b"x")
    assert "no whole safetensors file" in refusal(tmp_path / "cut").found
    (tmp_path / "text").write_text(json.dumps({"format": FORMAT}))
    assert "no whole safetensors file" in refusal(tmp_path / "text").found
    error = refusal(next(models["gpt-oss"].glob("*.safetensors")))
    assert (error.field, error.found) == ("metadata", f'no entry "{FORMAT}"')


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000])
def test_headers_that_are_none(tmp_path: Path, text: str) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "s", {FORMAT: text})
    assert refusal(tmp_path / "s").field in ("header", "format")


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    write(collected("run-1", modes=("router",)), tmp_path / "s")
    data, rng = (tmp_path / "s").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        at = int(rng.integers(len(data)))
        (tmp_path / "t").write_bytes(data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :])
        try:
            read(tmp_path / "t")
        except StatisticsError:
            refused += 1
    # A count that grew a little cannot be told from a true one, except on the diagonal.
    assert refused > 100


def test_one_mask_a_file() -> None:
    masked = MaskEpoch(run="run-1", epoch=1, mask="sha256:" + "1" * 64, num_kept=[6] * 3, top_k=[4] * 3)
    both = header("run-1", ["default"], epochs=[MaskEpoch.of("run-1", 0, None, MODEL), masked])
    with pytest.raises(StatisticsError, match="one mask a file"):
        header_rules.check(both, "s")
    header_rules.check(header("run-1", ["default"], epochs=[masked, masked.model_copy(update={"epoch": 3})]), "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kept": [7, 6, 6]}, r"epochs\[1\]\.num_kept: found \[7, 6, 6\]; expected the same as in epochs\[0\]"),
        ({"top_k": [2] * 3}, r"epochs\[1\]\.top_k: found \[2, 2, 2\]; expected the same"),
        ({"mask": None}, r"epochs\[1\]\.mask: found None"),
        ({"epoch": 1}, "an epoch of a run twice"),
    ],
)
def test_epochs_of_one_mask_agree(change: dict[str, Any], message: str) -> None:
    masked = MaskEpoch(run="run-1", epoch=1, mask="sha256:" + "1" * 64, num_kept=[6] * 3, top_k=[4] * 3)
    second = masked.model_copy(update={"epoch": 3, **change})
    with pytest.raises(StatisticsError, match=message):
        header_rules.check(header("run-1", ["default"], epochs=[masked, second]), "s")


def test_a_mask_keeps_at_least_top_k() -> None:
    masked = MaskEpoch(run="run-1", epoch=1, mask="sha256:" + "1" * 64, num_kept=[6, 3, 6], top_k=[4] * 3)
    with pytest.raises(StatisticsError, match="at most num_kept"):
        header_rules.check(header("run-1", ["default"], epochs=[masked]), "s")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    write(GOOD, path)
    before = path.read_bytes()
    broken = copy.copy(GOOD.tensors)
    with pytest.raises(StatisticsError, match=r"router\.count"):
        write(Statistics(GOOD.header, {**broken, "router.count": -GOOD["router.count"]}), path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stats_file, "save_file", full)
    with pytest.raises(StatisticsError, match="No space left on device; expected a place that can be written") as caught:
        write(GOOD, path)
    assert caught.value.file == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(StatisticsError, match="No such file or directory"):
        write(GOOD, tmp_path / "no" / "s")


def test_shapes_name_every_axis() -> None:
    every = shapes(GOOD.header)
    assert every["router.coactivation"] == (2, 3, 12, 12)
    assert every["eaft.grid_count"] == (2, 2, 3, 12, 3, 2)
    assert set(every) == set(SPECS)
