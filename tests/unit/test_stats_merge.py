"""Any order and grouping of files gives the same bytes, and files that are no sum of like things are refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics, read, write
from softprune.stats.header import MaskEpoch
from softprune.stats.merge import merge, merge_files
from tests.unit.stats_of import ALL, EAFT, MODEL, collected, header

PARTS = [
    collected("run-b", ("default", "zebra", "code"), ALL, seed=1),
    collected("run-a", ("default", "tool use"), ("router", "eaft"), seed=2),
    collected("run-d", ("default",), ("reap",), seed=3),
    collected("run-c", ("default", "code", "apple"), ALL, seed=4, num_tokens=300),
]


def bytes_of(statistics: Statistics, folder: Path) -> bytes:
    write(statistics, folder / "s")
    return (folder / "s").read_bytes()


def test_any_order_and_grouping_gives_the_same_bytes(tmp_path: Path) -> None:
    expected = bytes_of(merge(PARTS), tmp_path)
    for order in itertools.permutations(PARTS):
        assert bytes_of(merge(order), tmp_path) == expected
        assert bytes_of(reduce(lambda a, b: merge([a, b]), order), tmp_path) == expected
        a, b, c, d = order
        assert bytes_of(merge([merge([a, b]), merge([c, d])]), tmp_path) == expected
        assert bytes_of(merge([a, merge([b, merge([c, d])])]), tmp_path) == expected


def test_floats_of_any_size_add_exactly() -> None:
    # Without a quantum these would differ in their last bits: 0.1 + 0.2 + 0.3 depends on the order already.
    rng = np.random.default_rng(0)
    parts = []
    for i in range(40):
        part = collected(f"run-{i}", modes=("router",), seed=i, num_tokens=3)
        sums = np.where(part["router.count"] > 0, 10.0 ** rng.uniform(-6, 6, part["router.count"].shape), 0)
        parts.append(Statistics.of(part.header, {**part.tensors, "router.gate_sum": sums}))
    forward, backward = merge(parts)["router.gate_sum"], merge(parts[::-1])["router.gate_sum"]
    assert forward.tobytes() == backward.tobytes()
    halves = merge([merge(parts[:20]), merge(parts[20:])])["router.gate_sum"]
    assert forward.tobytes() == halves.tobytes()


def test_tags_are_united_by_name() -> None:
    total = merge(PARTS)
    assert total.header.tags == ["default", "apple", "code", "tool use", "zebra"]
    code = sum(part["router.count"][part.header.tags.index("code")] for part in (PARTS[0], PARTS[3]))
    assert np.array_equal(total["router.count"][2], code)
    assert total.header.tokens["code"].prefill == sum(part.header.tokens["code"].prefill for part in (PARTS[0], PARTS[3]))
    assert total.header.tokens["default"].cached == 12
    everything = sum(int(part["eaft.hist"].sum()) for part in PARTS if "eaft" in part.header.modes)
    assert int(total["eaft.hist"].sum()) == everything
    assert np.array_equal(total["reap.count"][4], PARTS[0]["reap.count"][1])


def test_headers_are_united() -> None:
    head = merge(PARTS).header
    assert [run.id for run in head.runs] == ["run-a", "run-b", "run-c", "run-d"]
    assert [epoch.run for epoch in head.epochs] == ["run-a", "run-b", "run-c", "run-d"]
    assert head.modes == list(ALL)
    assert head.sampling == {"reap": 16, "eaft": 16, "shadow": 64}
    assert [data_set.id for data_set in head.data_sets] == ["UNION"]
    assert len(head.data_sets[0].hashes) == 4


def test_files_merge_as_statistics_do(tmp_path: Path) -> None:
    paths = []
    for i, part in enumerate(PARTS):
        write(part, tmp_path / f"{i}")
        paths.append(tmp_path / f"{i}")
    seen: list[tuple[str, int]] = []
    total = merge_files(paths, lambda name, size: seen.append((name, size)))
    assert bytes_of(total, tmp_path) == bytes_of(merge(PARTS), tmp_path)
    assert [name for name, _ in seen] == [str(path) for path in paths]
    write(total, paths[0])
    assert read(paths[0]).header == total.header


MASKED = MaskEpoch(run="run-x", epoch=1, mask="sha256:" + "1" * 64, num_kept=[6] * 3, top_k=[4] * 3)
OTHER_GRID = EAFT.model_copy(update={"grid": EAFT.grid.model_copy(update={"entropy": [0.0, 0.25, 1.0]})})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": MODEL.model_copy(update={"fingerprint": "sha256:" + "b" * 64})}, "model.fingerprint"),
        ({"model": MODEL.model_copy(update={"architecture": "Qwen3MoeForCausalLM"})}, "model.architecture"),
        ({"epochs": [MASKED]}, "epochs[0].mask"),
        ({"sampling": {"reap": 8, "eaft": 16}}, "sampling.reap"),
        ({"sampling": {"reap": 16, "eaft": 1}}, "sampling.eaft"),
        ({"confidence_bins": 10}, "confidence_bins"),
        ({"eaft": OTHER_GRID}, "eaft.grid"),
        ({"eaft": EAFT.model_copy(update={"attribution": "target"})}, "eaft.attribution"),
        ({"eaft": EAFT.model_copy(update={"plane": EAFT.plane.model_copy(update={"entropy_max": 2.0})})}, "eaft.plane"),
    ],
)
def test_unlike_things_are_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    for name, statistics in {"a": Statistics.zeros(header("run-y", ["default"])), "b": _zeros(changes)}.items():
        write(statistics, tmp_path / name)
    for order in (["a", "b"], ["b", "a"]):
        error = refusal([tmp_path / name for name in order])
        assert (error.file, error.field) == (str(tmp_path / order[1]), field)
        assert f"as in {tmp_path / order[0]}" in error.expected


def test_unlike_sampling_is_found_beyond_a_file_that_has_none(tmp_path: Path) -> None:
    parts = (
        Statistics.zeros(header("1", ["default"], ("reap",))),
        Statistics.zeros(header("2", ["default"], ("router",))),
        Statistics.zeros(header("3", ["default"], ("reap",), sampling={"reap": 4})),
    )
    for order in itertools.permutations(parts):
        with pytest.raises(StatisticsError, match=r"sampling\.reap"):
            merge(order)
        with pytest.raises(StatisticsError, match=r"sampling\.reap"):
            reduce(lambda a, b: merge([a, b]), order)


def test_a_run_is_not_counted_twice(tmp_path: Path) -> None:
    for name, parts in {"ab": PARTS[:2], "bc": (PARTS[0], PARTS[3])}.items():
        write(merge(parts), tmp_path / name)
    error = refusal([tmp_path / "ab", tmp_path / "bc"])
    assert (error.file, error.field) == (str(tmp_path / "bc"), "runs")
    assert "run-b" in error.found
    assert "ab too" in error.found
    assert refusal([tmp_path / "ab", tmp_path / "ab"]).field == "runs"


def test_other_versions_and_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="no files"):
        merge_files([])
    with pytest.raises(StatisticsError, match="No such file"):
        merge_files([tmp_path / "missing"])


def _zeros(changes: dict[str, Any]) -> Statistics:
    return Statistics.zeros(header("run-x", ["default"], **changes))


def refusal(paths: Sequence[Path]) -> StatisticsError:
    with pytest.raises(StatisticsError) as caught:
        merge_files(paths)
    return caught.value
