"""The search finds exactly the largest size that runs, in few tries."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from softprune.bench.bracket import Bracket


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


def test_the_answer_lies_below_all_that_failed() -> None:
    bracket, _ = search(lambda size: size <= 20 and size != 12, 12, 64, 4)
    assert (bracket.low, bracket.not_monotone) == (11, [])  # 20 was never tried
    bracket.told(20, True)
    assert (bracket.low, bracket.high, bracket.not_monotone) == (11, 12, [12])
