"""Which sizes to try to find the largest that runs: steps that double until one fails, then halves between.

Sizes that are not tried are taken to run if they lie below one that ran; a size that failed below one that ran is remembered, and the
answer lies below all that failed.

Of requests that wait for room, as many run as there is room for. Where fewer ran than did at another time, or none was seen to wait, it may
be that they came too far apart for the length of their answers, or that a client with little time saw them so: their size is in doubt, and
tried again.
"""

from __future__ import annotations

from collections import Counter

DOUBTS = 5
"""So many failures of a size in a row that are in doubt are taken for one."""


class Bracket:
    """A search, told of each try.

    Args:
        start: the first size.
        most: no larger size is tried.
        jump: how far from `start` the second one lies; then twice that from it, and so on.
        step: the answer may be so much too small, less one.
    """

    def __init__(self, start: int, most: int, jump: int, step: int = 1) -> None:
        self.most, self.step = most, step
        self._size, self._jump = max(1, min(start, most)), max(1, jump)
        self.passed: set[int] = set()
        self._failures: list[tuple[int, int | None, bool]] = []
        self._last: int | None = None

    @property
    def failed(self) -> set[int]:
        """Sizes that failed, but for those in doubt."""
        most = max(self.passed, default=0)
        sure = {size for size, at_once, waited in self._failures if at_once is None or (waited and at_once >= most)}
        tried = Counter(size for size, _, _ in self._failures)
        return sure | {size for size, times in tried.items() if times >= DOUBTS}

    @property
    def low(self) -> int:
        """The largest size that ran, below all that failed; 0 for none."""
        return max((size for size in self.passed if self.high is None or size < self.high), default=0)

    @property
    def high(self) -> int | None:
        """The smallest size that failed."""
        return min(self.failed, default=None)

    @property
    def not_monotone(self) -> list[int]:
        """Sizes that failed although they, or larger ones, ran at another time."""
        return sorted(size for size in self.failed if any(other >= size for other in self.passed))

    def told(self, size: int, ran: bool, at_once: int | None = None, waited: bool = True) -> None:
        """What came of a size.

        Args:
            size: that was tried.
            ran: whether it did.
            at_once: how many of its requests ran, if not all did; None if it failed in another way.
            waited: whether others of them were seen to wait.
        """
        self._last = size
        if ran:
            self.passed.add(size)
            self._failures = [failure for failure in self._failures if failure[0] != size or failure[1] is None]
        else:
            self._failures.append((size, at_once, waited))

    def next(self) -> int | None:
        """The next size to try, or None: `low` is the answer."""
        if self._last is None:
            return self._size
        if self._last not in self.passed | self.failed:
            return self._last
        low, high = self.low, self.high
        if high is None:
            return None if low >= self.most else self._further(min(self.most, low + self._jump))
        if low == 0:
            return None if high == 1 else self._further(max(1, high - self._jump))
        return None if high - low <= self.step else (low + high) // 2

    def _further(self, size: int) -> int:
        self._jump *= 2
        return size
