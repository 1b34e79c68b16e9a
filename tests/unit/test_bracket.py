"""The search finds exactly the largest size that runs, in few tries."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from softprune.bench.bracket import DOUBTS, Bracket


def search(runs: Callable[[int], bool], start: int, most: int, jump: int, step: int = 1) -> tuple[Bracket, list[int]]:
    bracket, tries = Bracket(start, most, jump, step), []
    while (size := bracket.next()) is not None:
        tries.append(size)
        bracket.told(size, runs(size))
    return bracket, tries


@pytest.mark.parametrize("start", [1, 8, 100, 300])
@pytest.mark.parametrize("jump", [1, 8, 37])
def test_finds_every_capacity(start: int, jump: int) -> None:
    for capacity in range(201):
        bracket, tries = search(lambda size, capacity=capacity: size <= capacity, start, 200, jump)
        assert bracket.low == capacity
        assert bracket.high == (None if capacity == 200 else capacity + 1)
        assert len(tries) == len(set(tries)) <= 2 * math.log2(200) + 4
        assert bracket.not_monotone == []


def test_doubles_then_halves() -> None:
    assert search(lambda size: size <= 21, 8, 64, 8)[1] == [8, 16, 32, 24, 20, 22, 21]


def test_begins_near_a_good_guess() -> None:
    assert search(lambda size: size <= 97, 100, 1024, 12)[1] == [100, 88, 94, 97, 98]


def test_a_coarse_answer_is_too_small_by_less_than_a_step() -> None:
    for capacity in range(1, 100):
        low = search(lambda size, capacity=capacity: size <= capacity, 8, 100, 8, step=5)[0].low
        assert capacity - 5 < low <= capacity


def test_a_size_that_fails_at_another_time_is_not_the_answer() -> None:
    bracket, _ = search(lambda size: size <= 20, 8, 64, 8)
    bracket.told(20, False)
    assert (bracket.low, bracket.high, bracket.not_monotone) == (16, 20, [20])
    assert bracket.next() == 18
    bracket.told(18, True)
    assert bracket.next() == 19
    bracket.told(19, True)
    assert bracket.next() is None


def test_a_size_of_which_fewer_ran_than_of_another_is_tried_again() -> None:
    """32 run; of the first 32, and of others later on, 27 and 20 were seen at once."""
    bracket = Bracket(32, 40, 8)
    tries = []
    doubtful = {1: 27, 4: 20, 6: 20}
    while (size := bracket.next()) is not None:
        tries.append(size)
        at_once = min(size, doubtful.get(len(tries), 32))
        bracket.told(size, size <= at_once, at_once)
    assert tries == [32, 24, 28, 40, 40, 34, 34, 31, 32, 33]
    assert (bracket.low, bracket.high, bracket.not_monotone) == (32, 33, [])


def test_a_size_of_which_none_was_seen_to_wait_is_tried_again() -> None:
    bracket = Bracket(8, 64, 8)
    bracket.told(8, False, 7, waited=False)
    assert (bracket.next(), bracket.high) == (8, None)
    bracket.told(8, True)
    assert (bracket.next(), bracket.failed) == (16, set())


def test_a_size_that_is_always_in_doubt_fails() -> None:
    bracket, _ = search(lambda size: size <= 20, 8, 64, 8)
    for ran in [False] * (DOUBTS - 1) + [True] + [False] * DOUBTS:
        assert (bracket.low, bracket.next()) == (20, None)
        bracket.told(20, ran, 15)
    assert (bracket.low, bracket.high, bracket.not_monotone) == (16, 20, [20])


def test_the_answer_lies_below_all_that_failed() -> None:
    bracket, _ = search(lambda size: size <= 20 and size != 12, 12, 64, 4)
    assert (bracket.low, bracket.not_monotone) == (11, [])  # 20 was never tried
    bracket.told(20, True)
    assert (bracket.low, bracket.high, bracket.not_monotone) == (11, 12, [12])
