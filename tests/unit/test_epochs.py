"""Which masks a request ran under, and the names that it is found by."""

from __future__ import annotations

import itertools

import pytest

from softprune.runtime.epochs import REMEMBERED, Epochs, RequestIndex, cache_namespace
from softprune.vllm_ext.seams import call_ids

A, B = (f"sha256:{letter * 64}" for letter in "ab")


def test_a_cache_namespace_belongs_to_one_mask_and_one_salt() -> None:
    owns = [None, "x", "softprune:unpruned:x", f"{A}:x", f"softprune:{A}:x", ":", "::", "unpruned", A, " ", "x "]
    pairs = list(itertools.product([None, A, B], owns))
    names = {cache_namespace(*pair) for pair in pairs}
    assert len(names) == len(pairs)
    assert cache_namespace(None, None) is None
    assert [name for name in names if name is None or not name.startswith("softprune:")] == [None]


@pytest.mark.parametrize("mask_hash", [None, A])
def test_an_empty_salt_is_none(mask_hash: str | None) -> None:
    assert cache_namespace(mask_hash, "") == cache_namespace(mask_hash, None)


def test_epochs_are_stamped_when_steps_are_launched() -> None:
    epochs = Epochs(None)
    epochs.stamp(["a", "b"], 20)
    assert epochs.switch(A) == epochs.current == 1
    assert epochs.crossed == 2  # in flight, even before their next step
    epochs.stamp(["a", "c"], 6)
    epochs.stamp(["a", "c"], 2, all_seen=True)
    assert epochs.finish("b") == [0]
    assert epochs.crossed == 1
    assert epochs.switch(None) == 2
    epochs.stamp(["a", "c"], 2, all_seen=True)
    assert (epochs.finish("a"), epochs.finish("c")) == ([0, 1, 2], [1, 2])
    assert epochs.status() == {"mask_epoch": 2, "mask_hash": None, "crossed_requests": 0}
    assert (epochs.masks, epochs.tokens) == ([None, A, None], [20, 8, 2])
    assert epochs.finish("never ran") == []
    assert epochs.of("never ran") is None


def test_pure_decoding_costs_no_loop_unless_a_switch_is_pending() -> None:
    class Ids(list[str]):
        read = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            Ids.read += 1
            return super().__iter__()

    epochs, ids = Epochs(None), Ids(["a", "b"])
    epochs.stamp(ids, 2)
    for _ in range(10):
        epochs.stamp(ids, 2, all_seen=True)
    assert Ids.read == 1
    epochs.switch(A)
    for _ in range(10):
        epochs.stamp(ids, 2, all_seen=True)
    assert Ids.read == 2
    epochs.switch(B)
    epochs.stamp(["a"], 1, all_seen=True)
    epochs.finish("b")  # and b is waited for no more
    epochs.stamp(ids, 2, all_seen=True)
    assert Ids.read == 2
    assert epochs.finish("a") == [0, 1, 2]


def test_a_request_can_be_asked_for_while_it_runs_and_after() -> None:
    epochs = Epochs(A, call_ids)
    epochs.stamp(["cmpl-1-0-f00df00d", "cmpl-1-1-beefbeef"], 8)
    epochs.finish("cmpl-1-0-f00df00d")
    epochs.switch(B)
    epochs.stamp(["cmpl-1-1-beefbeef"], 1)
    parts = {"cmpl-1-0-f00df00d": [0], "cmpl-1-1-beefbeef": [0, 1]}
    expected = {"id": "cmpl-1", "epochs": [0, 1], "masks": {"0": A, "1": B}, "parts": parts, "finished": False}
    assert epochs.of("cmpl-1") == expected
    epochs.finish("cmpl-1-1-beefbeef")
    assert epochs.of("cmpl-1") == {**expected, "finished": True}
    assert epochs.of("cmpl-1-0") == {
        "id": "cmpl-1-0", "epochs": [0], "masks": {"0": A}, "parts": {"cmpl-1-0-f00df00d": [0]}, "finished": True,
    }  # fmt: skip


def test_an_id_that_comes_again_is_the_new_request() -> None:
    epochs = Epochs(None)
    epochs.stamp(["x"], 1)
    epochs.finish("x")
    epochs.switch(A)
    epochs.stamp(["x"], 1)
    assert epochs.of("x") == {"id": "x", "epochs": [1], "masks": {"1": A}, "parts": {"x": [1]}, "finished": False}


@pytest.mark.parametrize("name", ["cmpl-a7", "cmpl-a7-0", "cmpl-a7-0-0123abcd", "cmpl-a7-1-0123abcd", "1_cmpl-a7", "cmpl-a7-2"])
def test_all_names_of_a_vllm_call_find_it(name: str) -> None:
    index = RequestIndex(names=call_ids)
    ids = ("cmpl-a7-0-0123abcd", "cmpl-a7-1-0123abcd", "1_cmpl-a7", "cmpl-a7-2", "cmpl-a8-0-0123abcd")
    for epoch, request_id in enumerate(ids):
        index.add(request_id, [epoch])
    found = index.find(name)
    assert found
    assert "cmpl-a8-0-0123abcd" not in found
    assert index.epochs(name) == sorted(epoch for one in found.values() for epoch in one)
    assert index.find("cmpl-a9") == {}
    assert index.find("cmpl") == {}
    assert index.epochs("cmpl-a9") is None


def test_by_default_an_id_is_its_own_name_only() -> None:
    index = RequestIndex()
    index.add("job-1", [0])
    assert (index.epochs("job"), index.epochs("job-1")) == (None, [0])


def test_the_last_10_000_are_remembered() -> None:
    index = RequestIndex(names=call_ids)
    for number in range(REMEMBERED + 5):
        index.add(f"cmpl-{number:05d}-0", [number])
    index.add("cmpl-00005-0", [7])  # again, so it is the newest
    index.add("cmpl-new-0", [8])
    assert [index.epochs(f"cmpl-{number:05d}") for number in (4, 5, 6, 7)] == [None, [7], None, [7]]
    assert index.epochs("cmpl-new") == [8]
    # Nothing is kept of what was forgotten.
    assert len(index._epochs) == REMEMBERED == 10_000
    assert len(index._named) == 2 * REMEMBERED


def test_one_request_is_counted_once_however_often_it_ends() -> None:
    index = RequestIndex(room=2)
    for _ in range(5):
        index.add("a", [0])
    index.add("b", [1])
    assert (index.epochs("a"), index.epochs("b")) == ([0], [1])
