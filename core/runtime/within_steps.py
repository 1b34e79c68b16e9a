"""Sampled rows that are measured within their layers: those of steps with many of them, long prefills.

What the layer's own kernels made of the rows is read; where that cannot be, the experts are run on them again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.runtime.expert_norms import Experts, Routed, routed
from softprune.runtime.gated_outputs import GatedOutputs
from softprune.runtime.router_stats import chosen_experts
from softprune.runtime.sample_slab import STEP_ROWS, SampleSlab
from softprune.runtime.sampling import Settings

_AGREEMENT = 0.05
"""Largest relative difference of a norm that was read from one that was computed again; both round to BF16."""
_SORTED = 1 << 22
"""Logits sorted at once, which takes some 20 bytes each: of all layers at the default sampling, of some if every token is sampled."""
_APART = 256
"""Least difference between two sizes that long steps are padded to."""


@dataclass(frozen=True)
class Read:
    """What was read of rows in one layer; what they were routed to follows from it, of all layers at once.

    Attributes:
        logits: [n, num_experts], of the router.
        gated: float32 [n, top_k], norms of the chosen experts' outputs times their gates, experts ascending.
        shadow: see `Routed`.
    """

    logits: torch.Tensor
    gated: torch.Tensor
    shadow: torch.Tensor | None


class WithinSteps:
    """Measures rows within the layers of a step.

    Args:
        slab: whose rows these are like: [layers, rows, hidden_size] inputs, [layers, rows, num_experts] logits.
        top_k: experts per token.
        max_rows: tokens in a step at most.
        log: the engine's.

    Attributes:
        outputs: what experts made within a step, where it can be read.
        reads: whether it can; known from `warm_up` on.
        least: sampled rows of a step beyond which they are measured within it; at most SLAB_ROWS. An extension sets it before `warm_up`.
        pads: whether the engine's layers are given `padded` rows where outputs are read; an extension sets it before `warm_up`.
    """

    def __init__(self, slab: SampleSlab, top_k: int, max_rows: int, log: logging.Logger) -> None:
        self.outputs, self.reads, self.pads, self.least = GatedOutputs(log), False, False, STEP_ROWS
        self._hidden, self._logits = slab.hidden, slab.logits
        self._top_k, self._max_rows, self._log = top_k, max_rows, log

    def warm_up(self, experts: Experts) -> None:
        """Find out whether outputs can be read, and compile what steps need: a kernel that is compiled in serving holds up for seconds."""
        self.reads = self.outputs.watch() and all(self.agrees(experts, rows) for rows in self.long_steps())
        how = "are read from the kernels" if self.reads else "take a second run of the experts, as these kernels show none"
        self._log.info("softprune: norms in prefills of more than %d tokens %s", self.least * Settings().sample, how)
        if not self.reads:
            self.compile_again(experts)

    def padded(self, rows: int) -> int:
        """The size that a step of so many rows is padded to, one of a few: kernels are compiled for each of them, and none while serving.

        Multiples of 256, from 2,048 on eight between two powers of two; the largest is `max_rows`.
        """
        apart = max(_APART, 1 << max(0, rows.bit_length() - 4))
        return min(-(-rows // apart) * apart, max(rows, self._max_rows))

    def long_steps(self) -> list[int]:
        """Numbers of rows that compile what long steps need as no captured graph: kernels differ by tile and divisibility by 16."""
        if self.pads:
            sizes = [self.padded(1)]
            while sizes[-1] < self._max_rows:
                sizes.append(self.padded(sizes[-1] + 1))
            return sizes
        least = STEP_ROWS * Settings().sample
        powers = [least << i for i in range(8)]
        return [STEP_ROWS, *(rows + more for rows in powers for more in (1, 9) if rows + more <= self._max_rows)]

    def compile_again(self, experts: Experts) -> None:
        """Run the experts on the numbers of rows that steps come with at the default sampling."""
        rows = 2 * STEP_ROWS
        while rows <= self._max_rows // Settings().sample + STEP_ROWS:
            hidden, logits = (kept[0, :1].expand(rows, -1).contiguous() for kept in (self._hidden, self._logits))
            routed(0, hidden, logits, self._top_k, experts)
            rows *= 2

    def agrees(self, experts: Experts, number: int) -> bool:
        """Whether outputs that are read of so many made-up rows have the norms that the experts give one at a time."""
        generator = torch.Generator().manual_seed(0)
        hidden, logits = (torch.randn(number, kept.shape[-1], generator=generator).to(kept) for kept in (self._hidden, self._logits))
        # As they are chosen in serving, the likeliest first: kernels that keep the order they are given do not agree.
        chosen = routed(0, hidden, logits, self._top_k, None)
        rows = torch.arange(0, number, max(1, number // STEP_ROWS), device=hidden.device)
        expected = routed(0, hidden[rows], logits[rows], self._top_k, experts).ascending()
        read: list[Read] = []
        self._read(rows, logits[rows], None, read.append)
        experts(0, hidden, chosen.ids.long(), chosen.gates)
        self.outputs.forget()
        return bool(read) and torch.allclose(self.stacked(read).norms[0], expected.norms, rtol=_AGREEMENT)  # type: ignore[index,arg-type]

    def placed(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Rows of a step on the device, without waiting for it: int64 [n], some more where the experts are run on them again."""
        # Kernels are compiled anew for numbers of rows that are no multiples of 16: the last row stands in for some more.
        more = 0 if self.reads else -len(rows) % STEP_ROWS
        described = torch.from_numpy(np.pad(rows, (0, more), mode="edge"))
        if self._hidden.is_cuda:
            described = described.pin_memory()
        return described.to(self._hidden.device, non_blocking=True)

    def measure(
        self, layers: dict[int, Routed | Read], layer: int, hidden: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor,
        experts: Experts | None, shadow: Callable[[int, torch.Tensor], torch.Tensor] | None,
    ) -> None:  # fmt: skip
        """Measure what a layer is about to make of its rows.

        Args:
            layers: where the layer's will be, now or once its experts have run.
            layer: position among the MoE layers.
            hidden: [rows of the step, at least hidden_size], its input.
            logits: [rows of the step, num_experts], of its router.
            rows: as `placed`.
            experts: the engine's; None leaves norms out.
            shadow: (layer, hidden) -> int16 [n, top_k], what the router would choose without a mask; None leaves it out.
        """
        width = self._hidden.shape[-1]
        if self.reads and experts is not None:
            unmasked = None if shadow is None else shadow(layer, hidden[rows, :width])
            self._read(rows, logits[rows], unmasked, functools.partial(layers.__setitem__, layer))
            return
        inputs = hidden[rows, :width]
        unmasked = None if shadow is None else shadow(layer, inputs)
        layers[layer] = replace(routed(layer, inputs, logits[rows], self._top_k, experts), shadow=unmasked)

    def stacked(self, layers: Sequence[Routed | Read]) -> Routed:
        """What rows were routed to in all layers of a step, of what `measure` had of each, in a new first axis."""
        read = [layer for layer in layers if isinstance(layer, Read)]
        if not read:
            return Routed.stacked([layer for layer in layers if isinstance(layer, Routed)])
        together = max(1, _SORTED // read[0].logits.numel())
        chosen = [self._chosen(read[first : first + together]) for first in range(0, len(read), together)]
        ids, gates = (torch.cat([of_some[i] for of_some in chosen]) for i in range(2))
        shadows = [layer.shadow for layer in read if layer.shadow is not None]
        found = Routed(ids, gates, None, torch.stack(shadows) if shadows else None).ascending()
        # The kernels keep gates in the dtype of the logits.
        norms = torch.stack([layer.gated for layer in read]) / found.gates.to(read[0].logits.dtype).float()
        return replace(found, norms=norms)

    def _chosen(self, read: Sequence[Read]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, gates = chosen_experts(torch.stack([layer.logits for layer in read]).float(), self._top_k)
        return ids.to(torch.int16), gates

    def missed(self, seen: int, num_layers: int) -> None:
        """A step ended of which so many layers were measured: outputs are not read any more."""
        if self.reads:
            self.reads = False
            text = "softprune: read the outputs of %d of %d layers; from now on, a second run of the experts gives their norms"
            self._log.warning(text, seen, num_layers)

    def _read(self, rows: torch.Tensor, logits: torch.Tensor, shadow: torch.Tensor | None, then: Callable[[Read], None]) -> None:
        """Once the next layer's experts have run, give `then` what they made of these rows, whose logits are given."""
        width, expected = self._hidden.shape[-1], (len(rows), self._top_k)

        def measure(gated: torch.Tensor) -> None:
            if gated.shape[:-1] != expected:
                raise ValueError(f"found outputs {list(gated.shape)}; expected {[*expected, width]}")
            then(Read(logits, torch.linalg.vector_norm(gated[..., :width], dim=-1, dtype=torch.float32), shadow))

        self.outputs.ask(rows, measure)
