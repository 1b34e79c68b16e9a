"""What routers chose, added up on the device: counts, gates, confidence and co-activation, for all MoE layers of a step at once.

The engine's router products land in one slab; when the step has been computed, `add` reads it once. All shapes and addresses are fixed,
nothing waits for the host, and how many rows count is itself on the device, so that a captured graph can hold the call. Gates are added as
64-bit integers in units of 2**-32: the sums are the same whatever the order in which blocks of rows finish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

CONFIDENCE_BINS = 64
"""Of the largest gate, over [0, 1]."""
GATE_UNIT = 2.0**-32
PHASES = ("prefill", "decode")
_HEAD = 4
"""Places before the cells in the tensor that describes a step."""


@dataclass(frozen=True)
class RouterSums:
    """Sums since the last reset, on the host.

    Attributes:
        count: int64 [num_tags, 2, num_layers, num_experts]; selections in prefill and in decoding.
        gate_sum: float64, same shape; softmax over the chosen logits.
        confidence: int64 [num_tags, 2, num_layers, CONFIDENCE_BINS]; tokens by their largest gate.
        coactivation: int64 [num_tags, num_layers, num_experts, num_experts]; tokens that chose both; symmetric, the diagonal is the count.
    """

    count: torch.Tensor
    gate_sum: torch.Tensor
    confidence: torch.Tensor
    coactivation: torch.Tensor


@dataclass(frozen=True)
class TakenSums:
    """Sums on their way to the host, or there: exact integers that add up.

    Attributes:
        tensors: int64, in `RouterStats`' own order and shapes, in host memory.
        copied: CUDA event after the copies, or None where they are done.
    """

    tensors: tuple[torch.Tensor, ...]
    copied: torch.cuda.Event | None = None

    def added(self, more: TakenSums) -> TakenSums:
        """Both together, in new tensors; waits until both have arrived."""
        for one in (self, more):
            one.wait()
        return TakenSums(tuple(a + b for a, b in zip(self.tensors, more.tensors, strict=True)))

    def wait(self) -> None:
        """Until the copies are done."""
        if self.copied is not None:
            self.copied.synchronize()

    def sums(self) -> RouterSums:
        """By tag and phase; waits until they have arrived."""
        self.wait()
        count, gates, confidence, coactivation = self.tensors

        def apart(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view(-1, len(PHASES), *tensor.shape[1:])

        return RouterSums(apart(count), apart(gates).double() * GATE_UNIT, apart(confidence), coactivation)


class RouterStats:
    """The slab, what describes its rows, and the sums.

    Args:
        num_layers, num_experts, top_k: of the model; `num_experts` is at least `top_k`.
        num_tags: kept apart.
        max_rows: tokens in a step at most.
        device: the routers'.
        dtype: of the router's logits.

    Attributes:
        slab: [num_layers, max_rows, num_experts], the logits of a step.
        cells: int32 [max_rows]; 2 * tag + phase of each row (phase 0: prefill, 1: decode), -1 for rows that don't count.
        max_rows: see above.
        num_rows: int32 [1]; later rows are padding. 0 switches collection off without capturing anything again.
    """

    def __init__(
        self, num_layers: int, num_experts: int, top_k: int, num_tags: int, max_rows: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.top_k, self.max_rows = top_k, max_rows
        self.slab = torch.zeros(num_layers, max_rows, num_experts, dtype=dtype, device=device)
        # One tensor, so that one copy describes a step; cells begin where a kernel's wide loads like it.
        self._described = torch.full((_HEAD + max_rows,), -1, dtype=torch.int32, device=device)
        self.num_rows, self.cells = self._described[:1], self._described[_HEAD:]
        self.num_rows.zero_()
        self._last: NDArray[np.int32] | None = None
        cells = 2 * num_tags

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._count, self._gates = zeros(cells, num_layers, num_experts), zeros(cells, num_layers, num_experts)
        self._confidence = zeros(cells, num_layers, CONFIDENCE_BINS)
        self._coactivation = zeros(num_tags, num_layers, num_experts, num_experts)

    @property
    def num_bytes(self) -> int:
        """Of device memory."""
        return sum(tensor.nbytes for tensor in (self.slab, self._described, *self._sums))

    def describe(self, cells: NDArray[np.int32]) -> None:
        """Say which rows of the step count, on the current stream and without waiting for it.

        Args:
            cells: int32 [rows], at most `max_rows`; see `cells` above.
        """
        if self._last is not None and np.array_equal(cells, self._last):
            return  # as in most steps of pure decoding
        head = np.full(_HEAD, len(cells), np.int32)
        described = torch.from_numpy(np.concatenate([head, cells]))
        if self.slab.is_cuda:
            described = described.pin_memory()  # its memory is not used again before the copy is done
        self._described[: len(described)].copy_(described, non_blocking=True)
        self._last = cells

    def add(self, rows: int) -> None:
        """Add up the first `rows` rows of the slab, less padding: on a GPU one kernel, elsewhere plain PyTorch.

        Args:
            rows: an upper bound of `num_rows` that the host knows; in a captured graph, the graph's own batch size.
        """
        if self.slab.is_cuda:
            from softprune.runtime import router_stats_kernel

            router_stats_kernel.add(self, rows)
        else:
            self.add_reference(rows)

    def add_reference(self, rows: int) -> None:
        """`add` in PyTorch; what the kernel is compared with."""
        row = torch.arange(rows, device=self.slab.device)
        counted = (row < self.num_rows) & (self.cells[:rows] >= 0)
        cells = self.cells[:rows][counted].long()
        for layer, logits in enumerate(self.slab[:, :rows]):
            chosen, gates = top_k_gates(logits[counted].float(), self.top_k)
            self._count[:, layer].index_add_(0, cells, chosen.long())
            self._gates[:, layer].index_add_(0, cells, (gates / GATE_UNIT).round().long())
            bins = (gates.amax(-1) * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
            self._confidence[:, layer].index_put_((cells, bins), torch.ones_like(cells), accumulate=True)
            pairs = chosen.long()[:, :, None] * chosen.long()[:, None, :]
            self._coactivation[:, layer].index_add_(0, cells // 2, pairs)

    def read(self) -> RouterSums:
        """Copy the sums to the host; waits for what the current stream has queued."""
        return self.copied().sums()

    def copied(self) -> TakenSums:
        """Copy the sums to the host; does not wait."""
        if not self.slab.is_cuda:
            return TakenSums(tuple(tensor.clone() for tensor in self._sums))
        host = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in self._sums)
        for to, tensor in zip(host, self._sums, strict=True):
            to.copy_(tensor, non_blocking=True)
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return TakenSums(host, event)

    def take(self) -> TakenSums:
        """`copied`, and back to zero: what is added after this call, on the same stream, is none of it."""
        taken = self.copied()
        self.reset()
        return taken

    def reset(self) -> None:
        """Back to zero."""
        for tensor in self._sums:
            tensor.zero_()

    @property
    def _sums(self) -> tuple[torch.Tensor, ...]:
        return self._count, self._gates, self._confidence, self._coactivation

    def kernel_arguments(self) -> tuple[Any, ...]:
        """The tensors in the kernel's order."""
        return (self.slab, self.cells, self.num_rows, *self._sums)


def top_k_gates(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Selection as gpt-oss's kernels make it: the largest logits, the smaller id first among equals, softmax over those chosen.

    Args:
        logits: float32 [n, num_experts]; -inf is never chosen as long as `top_k` are finite.

    Returns:
        (chosen bool [n, num_experts], gates float32, same shape, 0 where not chosen).
    """
    ids, gates = chosen_experts(logits, top_k)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    return chosen, torch.zeros_like(logits).scatter_(1, ids, gates)


def chosen_experts(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_k_gates` by choice: (ids int64 [n, top_k], the largest logit's first; gates float32, same shape)."""
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return ids[..., :top_k], values[..., :top_k].softmax(-1)
