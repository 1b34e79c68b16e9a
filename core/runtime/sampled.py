"""Collecting the modes `reap` and `eaft` in a serving engine: sampled rows, and how sure the model was of its tokens.

A sampled row waits in the slab until a few hundred are there; then, between two steps, the engine's experts are run on them, and their
norms, gates and ids go to the host together with the tokens' scores. A step with many sampled rows (a long prefill) has them
measured within each layer instead (`softprune.runtime.within_steps`). The host adds up what arrived while the device goes on; it never
waits for a step.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprune.runtime.arrivals import Arrivals, Batch, Rows
from softprune.runtime.expert_norms import Experts, Routed, routed
from softprune.runtime.sample_slab import SLAB_ROWS, SampleSlab
from softprune.runtime.sampled_sums import SampledSums
from softprune.runtime.sampling import Sampling, Settings
from softprune.runtime.token_records import TokenRecords
from softprune.runtime.token_scores import token_scores
from softprune.runtime.within_steps import Read, WithinSteps

if TYPE_CHECKING:
    from softprune.runtime.collector import Span

TEACHER_FORCED, SAMPLED = 0, 1
"""Index of the kind axis."""
_WAITING_TOKENS = 8192
"""Records from which on they are fetched."""
_REMEMBERED = 4096
"""Requests whose last record is remembered, for attribution to the token itself."""


@dataclass
class _Step:
    """A step that is under way.

    Attributes:
        rows: positions of the sampled rows.
        layers: what they were routed to in each layer, if that is measured within the step; None if they wait in the slab.
        spans: None until the step has been launched.
        records: int64 [rows of the step], number of the record of the token that each row predicted; -1 for none.
    """

    rows: NDArray[np.int64]
    layers: dict[int, Routed | Read] | None
    spans: Sequence[Span] | None = None
    records: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @functools.cached_property
    def completions(self) -> NDArray[np.int64]:
        """Of each row, its tag if the token that it predicts is of a completion, else -1; asked for once for each request."""
        return _tags_of_completions(self.spans or ())


class Sampler:
    """Samples in one process; every call comes between two steps or within one, on the stream that runs the model.

    Args:
        num_layers, num_experts, top_k, hidden_size: of the model.
        num_tags: kept apart.
        max_rows: tokens in a step at most.
        device, dtype: of the routers' logits.
        eaft: have room for sums of `eaft`.
        log: the engine's.

    Attributes:
        experts: the engine's; the extension connects them before the first step.
        unmasked: (layer, hidden) -> logits without a mask, for shadow counts.
        settings: None while nothing is collected.
        lost: sampled rows that could not be measured, and tokens without finite scores.
        within: measures rows of long steps.
    """

    def __init__(
        self, num_layers: int, num_experts: int, top_k: int, hidden_size: int, num_tags: int, max_rows: int, device: torch.device,
        dtype: torch.dtype, eaft: bool, log: logging.Logger,
    ) -> None:  # fmt: skip
        self.experts: Experts | None = None
        self.unmasked: Callable[[int, torch.Tensor], torch.Tensor] | None = None
        self.settings: Settings | None = None
        self.lost = 0
        self._shape = num_tags, num_layers, num_experts, eaft
        self._top_k = top_k
        self._slab = SampleSlab(num_layers, num_experts, hidden_size, device, dtype)
        self.within = WithinSteps(self._slab, top_k, max_rows, log)
        self._records = TokenRecords(2 * max_rows + _WAITING_TOKENS, device)  # a row may be scored as given, not to count, and as drawn
        self._sums: dict[str | None, SampledSums] = {}
        self._sampling, self._starts = Sampling(1), 0
        self._mask: str | None = None
        self._step: _Step | None = None
        self._inline: torch.Tensor | None = None
        self._under_way = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: Routed | None = None
        self._graph_bytes = 0
        self._waiting: list[Rows] = []
        self._measured: list[tuple[Routed, Rows]] = []
        self._token_tags: list[NDArray[np.int64]] = []
        self._token_kinds: list[NDArray[np.int64]] = []
        self._arrivals = Arrivals(device)
        self._last: dict[str, tuple[int, int]] = {}
        self._started = False

    @property
    def num_bytes(self) -> int:
        """Of device memory, what the captured graph works in included."""
        return self._slab.num_bytes + self._records.num_bytes + self._graph_bytes

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Find out how rows are measured within steps, and capture what is done with a full slab, on a GPU.

        Launched kernel by kernel, the engine's experts cost the host 2 ms a layer.
        """
        if not self._slab.hidden.is_cuda or self.experts is None or self._graph is not None:
            return
        self.within.warm_up(self.experts)
        self._route_slab(SLAB_ROWS, self.experts, shadow=False)  # compiles
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # as capturing does
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._captured = self._route_slab(SLAB_ROWS, self.experts, shadow=False)
        self._graph, self._graph_bytes = graph, torch.cuda.memory_reserved() - before

    @property
    def measures_within(self) -> bool:
        """Whether the step that is being launched measures its rows within its layers: a captured graph would pass that by."""
        return self._inline is not None

    def start(self, settings: Settings, mask: str | None) -> None:
        """Sample from the next step on; sums go to those of a mask."""
        self.settings, self._mask, self._started = settings, mask, True
        self._starts += 1
        self._sampling = Sampling(settings.sample, seed=self._starts)  # not the same places in each part of a collection
        self._last.clear()  # predictions under another mask

    @torch.inference_mode()
    def stop(self) -> None:
        """Sample no more; what was sampled is on its way to the sums."""
        self._end_step()
        self._send()
        self._slab.describe(np.empty(0, np.int64))
        self.settings, self._inline = None, None

    def give_up(self) -> None:
        """Sample no more, whatever becomes of what was sampled; `reset` comes next."""
        self.settings, self._step, self._inline, self._under_way = None, None, None, False

    @torch.inference_mode()
    def sums(self, mask: str | None) -> SampledSums:
        """Sums under a mask, of all that was sampled until now; waits for the device."""
        self._end_step()
        self._send()
        self.lost += self._arrivals.finish()
        return self._sums_under(mask)

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget everything that was sampled, under all masks."""
        self._end_step()
        self._arrivals.forget()
        self._sums, self.lost = {}, 0
        self._slab.clear()
        if self.settings is None:
            self._slab.describe(np.empty(0, np.int64))
        self._records.fetch()
        self._waiting, self._measured, self._token_tags, self._token_kinds = [], [], [], []

    @torch.inference_mode()
    def begin(self, rows: int, captured: bool = False) -> None:
        """A step is about to be launched.

        Args:
            rows: of the step, padding left out.
            captured: it may run as a captured graph, which keeps SLAB_ROWS rows at most.
        """
        if self.settings is None or not self.settings.samples:
            return
        self._end_step()
        found = self._sampling.of(rows)
        if captured and len(found) > SLAB_ROWS:
            self.lost += len(found) - SLAB_ROWS
            found = self._sampling.some(found, SLAB_ROWS)
        within = not captured and len(found) > self.within.least
        if self._records.used > _WAITING_TOKENS or not (within or self._slab.has_room(len(found))):
            self._send()
        self._inline = None
        if within:
            self._inline = self.within.placed(found)
        self._slab.describe(found[:0] if within else found)
        self._step = _Step(found, {} if within else None)
        self._under_way = True

    def take(self, layer: int, hidden: torch.Tensor, logits: torch.Tensor, copy_to: torch.Tensor | None = None) -> None:
        """A layer is given its input: keep the sampled rows, or measure them now.

        Args:
            layer: position among the MoE layers.
            hidden: [rows, at least hidden_size], padding included.
            logits: [rows, num_experts], of the router.
            copy_to: [at most rows, num_experts], where the logits are to be copied as well, since one kernel can do both.
        """
        if self._keeps(hidden):
            self._slab.take(layer, hidden, logits, copy_to)
            return
        if copy_to is not None:
            copy_to.copy_(logits[: len(copy_to)])
        step = self._step
        if self._under_way and step is not None and self._inline is not None and step.layers is not None:
            assert self.settings is not None
            experts, shadow = self.experts if self.settings.mode != "router" else None, self._shadow if self.settings.shadow else None
            self.within.measure(step.layers, layer, hidden, logits, self._inline, experts, shadow)

    def _keeps(self, hidden: torch.Tensor) -> bool:
        """Whether a layer's rows go into the slab: in a captured graph always, since it cannot know what a step will sample."""
        if _capturing(hidden):
            return True
        if not self._under_way or self._step is None:
            # No step, but a check of the routers or a warm-up, in which the kernel is compiled: within a capture it is too late.
            return hidden.is_cuda and not self._started
        return self._inline is None or self._step.layers is None

    def has(self, spans: Sequence[Span]) -> None:
        """The step has these requests' tokens, in the order of its rows."""
        if self._step is not None and self._step.spans is None:
            self._step.spans = spans
            self._step.records = np.full(sum(span.rows for span in spans), -1, np.int64)

    def launched(self) -> None:
        """The step has been launched: its layers have been given their inputs."""
        self._inline, self._under_way = None, False
        self.within.outputs.forget()

    def drawn(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """The step's next tokens.

        Args:
            logits: [spans, vocabulary], as the model gave them.
            tokens: integers [spans]; those of requests that have not come to their end are thrown away.
        """
        step = self._step
        if not self.scores or step is None or step.spans is None:
            return
        if len(tokens) != len(step.spans):
            self.lost += len(tokens)
            return
        ends = np.cumsum([span.rows for span in step.spans]) - 1
        tags = np.array([span.tag if span.first + span.rows >= span.known else -1 for span in step.spans], np.int64)
        self._record(step, ends, tags, SAMPLED, token_scores(logits, tokens))

    def given(self, rows: NDArray[np.int64], logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Prompt tokens whose log-probabilities were asked for.

        Args:
            rows: int64 [n], of the step, whose predictions these are; -1 for what is not to be counted.
            logits: [n, vocabulary]; log-probabilities will do.
            tokens: integers [n], those that followed.
        """
        step = self._step
        if not self.scores or step is None or step.spans is None or not len(rows):
            return
        tags = np.where(rows < 0, -1, step.completions[rows])
        if (tags >= 0).any():
            self._record(step, rows, tags, TEACHER_FORCED, token_scores(logits, tokens))

    @property
    def spans(self) -> Sequence[Span]:
        """Of the step that is under way, if they are known."""
        return self._step.spans or () if self._step is not None else ()

    @property
    def scores(self) -> bool:
        """Whether tokens are scored now."""
        return self.settings is not None and self.settings.mode == "eaft"

    def _record(self, step: _Step, rows: NDArray[Any], tags: NDArray[np.int64], kind: int, scores: torch.Tensor) -> None:
        first = self._records.add(scores)
        if first is None:
            self.lost += len(scores)
            return
        self._token_tags.append(tags)
        self._token_kinds.append(np.full(len(tags), kind, np.int64))
        step.records[rows[tags >= 0]] = first + np.flatnonzero(tags >= 0)

    def _end_step(self) -> None:
        """All that is to be known of the last step is known."""
        step, self._step, self._inline, self._under_way = self._step, None, None, False
        self.within.outputs.forget()
        if step is None:
            return
        rows = self._rows_of(step)
        if not len(step.rows):
            return  # a list that grew with every step would never end
        if step.layers is None:
            self._waiting.append(rows)
        elif len(step.layers) == self._shape[1]:
            found = self.within.stacked([step.layers[layer] for layer in sorted(step.layers)])
            self._measured.append((found.first(len(step.rows)), rows))
        elif step.spans is not None:  # else they are lost already
            self.lost += len(step.rows)  # a captured graph ran, or outputs could not be read
            self.within.missed(len(step.layers), self._shape[1])
        if self._measured:
            self._send()

    def _rows_of(self, step: _Step) -> Rows:
        nothing = np.full(len(step.rows), -1, np.int64)
        if step.spans is None or (len(step.rows) and step.rows[-1] >= len(step.records)):
            self.lost += len(step.rows)
            return Rows(nothing, nothing)
        tags = np.repeat([span.tag for span in step.spans], [span.rows for span in step.spans]).astype(np.int64)
        records = step.records
        if self.scores and self.settings is not None and self.settings.attribution == "target":
            records = self._shifted(step.spans, records)
        return Rows(tags[step.rows], records[step.rows])

    def _shifted(self, spans: Sequence[Span], records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each row, the record of the prediction that led to its token: that of the request's row before it."""
        shifted, row = np.roll(records, 1), 0
        for span in spans:
            if span.rows:
                # What was computed so far may have been thrown away, and be computed again from an earlier token on.
                next_token, record = self._last.pop(span.request, (-1, -1))
                shifted[row] = record if next_token == span.first else -1
                row += span.rows
                self._last[span.request] = span.first + span.rows, int(records[row - 1])
        while len(self._last) > _REMEMBERED:
            self._last.pop(next(iter(self._last)))
        return shifted

    def _shadow(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """int16 [n, top_k], what the router would choose without a mask."""
        assert self.unmasked is not None
        return routed(layer, hidden, self.unmasked(layer, hidden), self._top_k, None).ids

    def _route_slab(self, rows: int, experts: Experts | None, shadow: bool) -> Routed:
        """What the first rows of the slab were routed to, in all layers."""
        layers = range(self._shape[1])
        hidden, logits = self._slab.hidden[:, :rows], self._slab.logits[:, :rows]
        found = Routed.stacked([routed(layer, hidden[layer], logits[layer], self._top_k, experts) for layer in layers])
        return replace(found, shadow=torch.stack([self._shadow(layer, hidden[layer]) for layer in layers])) if shadow else found

    def _measure_slab(self) -> Routed:
        """`_route_slab` of the rows in use, by the captured graph where there is one."""
        used, settings = self._slab.used, self.settings
        assert settings is not None
        if self._graph is None or self._captured is None or settings.mode == "router":
            return self._route_slab(used, self.experts if settings.mode != "router" else None, settings.shadow)
        self._graph.replay()
        found = self._captured.first(used)
        if settings.shadow:
            found = replace(found, shadow=self._route_slab(used, None, shadow=True).shadow)
        return found

    def _send(self) -> None:
        """Measure what waits in the slab, and send everything to the host, where it is added up once it is there."""
        if self.settings is None:
            return
        if self._slab.used:
            together = [np.concatenate([getattr(rows, name) for rows in self._waiting]) for name in ("tags", "records")]
            self._measured.append((self._measure_slab(), Rows(*together)))
            self._slab.clear()
            self._waiting = []
        if not self._measured and not self._records.used:
            return
        sent = [(found.to_host(), rows) for found, rows in self._measured]
        tokens = self._records.fetch()
        event = None
        if self._slab.hidden.is_cuda:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # whoever waits sleeps
            event.record()
        empty = [np.empty(0, np.int64)]
        tags, kinds = np.concatenate(empty + self._token_tags), np.concatenate(empty + self._token_kinds)
        batch = Batch(self._sums_under(self._mask), sent, tokens, tags, kinds, event)
        self._measured, self._token_tags, self._token_kinds = [], [], []  # it is sent, whatever became of those before it
        self.lost += self._arrivals.add(batch)

    def _sums_under(self, mask: str | None) -> SampledSums:
        if mask not in self._sums:
            self._sums[mask] = SampledSums(*self._shape)
        return self._sums[mask]


def _tags_of_completions(spans: Sequence[Span]) -> NDArray[np.int64]:
    """Of each row of a step, its tag if the token that it predicts is of a completion, else -1."""
    tags = np.repeat([span.tag for span in spans], [span.rows for span in spans]).astype(np.int64)
    row = 0
    for span in spans:
        if span.completions is not None:
            follows = np.arange(span.first + 1, span.first + span.rows + 1)
            inside = np.zeros(span.rows, bool)
            for begin, end in span.completions:
                inside |= (follows >= begin) & (follows < end)
            tags[row : row + span.rows][~inside] = -1
        row += span.rows
    return tags


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
