"""Counting what routers select, per MoE layer and expert: the evidence that a mask is obeyed.

For debugging and tests; it runs in eager mode only, where every step passes through Python.
"""

from __future__ import annotations

from typing import Any

import torch

TRACED_TOKENS = 16384
"""Rows a layer whose selections are kept one by one; later ones are only counted."""


class RouteProbe:
    """Counters on the routers' device.

    `counts` is int64 [num_layers, num_experts]; `tokens` int64 [num_layers], rows that passed each router;
    `enabled` is False while routers run on nobody's behalf;
    `traced` holds, per layer, the selections of its first rows since the last reset: int16 [rows, top_k], by ascending id.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(num_layers, dtype=torch.int64, device=device)
        self.traced: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._room = [TRACED_TOKENS] * num_layers
        self.epoch = 0
        self.enabled = True
        self._ended: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin_epoch(self) -> None:
        """What is recorded from now on was selected under another mask."""
        self._ended[self.epoch] = self.counts.clone(), self.tokens.clone()
        self.epoch += 1

    def record_ids(self, layer: int, ids: torch.Tensor) -> None:
        """Count selections that the engine made.

        Args:
            layer: position among the MoE layers.
            ids: integers [n, top_k].
        """
        if not self.enabled:
            return
        flat = ids.reshape(-1).to(torch.int64)
        self.counts[layer].index_add_(0, flat, torch.ones_like(flat))
        self.tokens[layer] += ids.shape[0]
        kept = min(self._room[layer], ids.shape[0])
        if kept:
            self.traced[layer].append(ids[:kept].to(torch.int16).sort(dim=-1).values)
            self._room[layer] -= kept

    def record_logits(self, layer: int, logits: torch.Tensor, top_k: int) -> None:
        """Count the top-k of router logits, for fused kernels that never hand out their selection.

        Ties go to the smaller id, as in triton_kernels.

        Args:
            layer: position among the MoE layers.
            logits: [n, num_experts].
            top_k: experts that the kernel selects.
        """
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
        self.record_ids(layer, order[:, :top_k])

    def snapshot(self, trace: bool = False) -> dict[str, Any]:
        """What was selected since the last reset; JSON-ready.

        Returns:
            {"tokens": [per layer], "counts": [[per expert] per layer], "epochs": {epoch: the same two of that mask epoch}}, and with
            `trace` "ids": [[[id, …] per row] per layer].
        """
        epochs, before = {}, (torch.zeros_like(self.counts), torch.zeros_like(self.tokens))
        for epoch, (counts, tokens) in {**self._ended, self.epoch: (self.counts, self.tokens)}.items():
            epochs[str(epoch)] = {"tokens": (tokens - before[1]).tolist(), "counts": (counts - before[0]).tolist()}
            before = counts, tokens
        counted = {"tokens": self.tokens.tolist(), "counts": self.counts.tolist(), "epochs": epochs}
        if not trace:
            return counted
        return {**counted, "ids": [torch.cat(rows).tolist() if rows else [] for rows in self.traced]}

    def reset(self) -> None:
        """Back to zero."""
        self.counts.zero_()
        self.tokens.zero_()
        self.traced = [[] for _ in self.traced]
        self._room = [TRACED_TOKENS] * len(self._room)
        self._ended = {}
