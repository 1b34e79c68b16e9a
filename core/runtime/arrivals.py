"""What the device sent to the host is added to the sums, on a thread of its own: the one that launches steps waits for none of it.

Adding up a prefill of 8,192 scored tokens, 512 of them sampled, takes 5 to 10 ms, in which an engine that launches its kernels one by one
would launch none. Beside this thread it goes on, but for fractions of a millisecond in which NumPy keeps the interpreter to itself.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.runtime.expert_norms import Routed
from softprune.runtime.sampled_sums import SampledSums
from softprune.runtime.token_records import Fetched

_MOST = 8
"""Batches that may wait; whoever sends more waits for the oldest."""


@dataclass(frozen=True)
class Rows:
    """Sampled rows: tag (-1: lost) and record of each."""

    tags: NDArray[np.int64]
    records: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """What was sent to the host together.

    Attributes:
        sums: what it is added to.
        sent: sampled rows of all layers.
        tokens: scored ones.
        token_tags, token_kinds: int64 [n], of these.
        arrived: the device has got to after the copies; None where nothing is copied.
    """

    sums: SampledSums
    sent: list[tuple[Routed, Rows]]
    tokens: Fetched
    token_tags: NDArray[np.int64]
    token_kinds: NDArray[np.int64]
    arrived: torch.cuda.Event | None


class Arrivals:
    """Adds batches up one after another, in the order in which they were sent.

    Args:
        device: that sends them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: deque[Future[int]] = deque()
        self._before = Fetched(0, torch.zeros(0, 3)), np.empty(0, np.int64)

    def add(self, batch: Batch) -> int:
        """Have a batch added up once it has arrived.

        Returns:
            Rows and tokens of earlier batches, added up since the last call, that had no finite values and were left out.
        """
        self._thread = self._thread or ThreadPoolExecutor(1, "softprune-sums", self._begin)
        self._under_way.append(self._thread.submit(self._add, batch))
        lost = 0
        while self._under_way and (self._under_way[0].done() or len(self._under_way) > _MOST):
            lost += self._under_way.popleft().result()
        return lost

    def finish(self) -> int:
        """Wait until all is added up; returns what `add` does."""
        lost = 0
        while self._under_way:
            lost += self._under_way.popleft().result()
        return lost

    def forget(self) -> None:
        """Wait until nothing is added up any more, whatever became of it."""
        while self._under_way:
            self._under_way.popleft().exception()

    def _begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # else waiting may take up memory of the first card

    def _add(self, batch: Batch) -> int:
        if batch.arrived is not None:
            batch.arrived.synchronize()
        lost = 0
        if len(batch.token_tags):
            lost += batch.sums.add_tokens(batch.token_tags, batch.token_kinds, batch.tokens.values.numpy())
        for found, rows in batch.sent:
            scores = np.full((len(rows.records), 3), np.nan, np.float32)
            kinds = np.zeros(len(rows.records), np.int64)
            for tokens, of_token in (self._before, (batch.tokens, batch.token_kinds)):
                here = tokens.look_up(rows.records, scores)
                kinds[here] = of_token[rows.records[here] - tokens.first]
            lost += batch.sums.add_rows(found, rows.tags, kinds, scores)
        self._before = batch.tokens, batch.token_kinds
        return lost
