"""Masks switched live in SGLang's scheduler processes, and what keeps KV of different masks apart.

Every tensor-parallel rank has a scheduler of its own; all of them are sent the same requests in the same order and do the same
with them, so a switch that all agree on happens between the same two steps on every rank.

A request's KV is cached under a name that is the mask's. A request that has KV when the mask changes may hold KV of both masks
from then on: nothing more of it is put into the prefix cache, and what was put there before keeps its name.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from softprune.control import ControlError, raise_answer, refusal_among
from softprune.runtime.collector import Span
from softprune.runtime.epochs import Epochs, cache_namespace
from softprune.runtime.masked_model import MaskedModel
from softprune.sglang_ext import collector as collecting
from softprune.sglang_ext import seams

logger = logging.getLogger("sglang.softprune")

EPOCHS_KEY = "softprune"
"""Key under which a finished request's epochs travel in its finish reason, until the front end takes them out."""

_OWN_KEY = "softprune_own_key"
"""Attribute of a request: the cache key that its user gave it."""
_BARRED = "softprune_barred"
"""Attribute of a request: softprune keeps it out of the prefix cache."""


class LiveMask:
    """A scheduler process's mask in force, its switches, and the epochs of its requests.

    Attributes:
        model: the masked model.
        epochs: which requests ran under which masks.
        draining: nothing new is started, since a switch waits for what is running.
        spans: rows of the step that is being launched, where statistics are collected.
    """

    def __init__(self, model: MaskedModel) -> None:
        self.model, self.epochs, self.draining = model, Epochs(model.launch.mask_hash), False
        self._outcome: dict[str, Any] | ControlError | None = None
        self.spans: list[Span] = []

    def switch(self, scheduler: Any, text: str | None, in_flight: str) -> dict[str, Any] | None:
        """Put a mask in force on every rank or on none; called on all of them, between the same two steps.

        Args:
            scheduler: SGLang's, of this rank.
            text: of a mask file; None for no mask.
            in_flight: what becomes of requests that are running: "continue", "drain" or "retract".

        Returns:
            {"epoch", "ranks": every rank's new status}; None while it waits for what is running, see `outcome`.

        Raises:
            ControlError: a rank refused it; nothing has changed.
        """
        if self.draining:
            raise ControlError(409, "switch_in_progress", "another switch waits for running requests")
        if in_flight == "drain" and _of(scheduler, "_engine_paused"):
            raise _paused()
        with on_model_stream(scheduler):
            vote = self.model.stage(text)
        refusal = refusal_among(from_all_ranks(scheduler, vote))
        if refusal is not None:
            self.model.drop()
            raise_answer(refusal)
        self._outcome = None
        if in_flight == "drain":
            self.draining = True
        else:
            if in_flight == "retract" or _must_retract(scheduler):
                _retract_all(scheduler)
            self._outcome = self._commit(scheduler)
        return self.outcome()

    def outcome(self) -> dict[str, Any] | None:
        """What the last switch has led to; None while it waits.

        Raises:
            ControlError: it failed after the wait.
        """
        if isinstance(self._outcome, ControlError):
            raise self._outcome
        return self._outcome

    def status(self) -> dict[str, Any]:
        """For `GET status`."""
        return {**self.epochs.status(), "draining": self.draining}

    def end_drain(self, scheduler: Any) -> None:
        """Switch, if nothing is running any more; give it up, if nothing will. Never raises: that would end the server."""
        try:
            if _is_drained(scheduler):
                self.draining = False
                self._outcome = self._commit(scheduler)
            elif _of(scheduler, "_engine_paused"):
                self.model.drop()
                self.draining, self._outcome = False, _paused()
        except Exception as error:
            logger.exception("softprune: the switch after the drain failed")
            self.draining, self._outcome = False, ControlError.of(error)

    def _commit(self, scheduler: Any) -> dict[str, Any]:
        with on_model_stream(scheduler):
            status = self.model.commit()
        before, after = self.epochs.masks[-1], (status["mask"] or {}).get("hash")
        epoch = self.epochs.switch(after)
        if after != before:
            for request in _with_kv(scheduler):
                _bar_from_cache(request)
            for request in _waiting(scheduler):
                self.enter_queue(request)
        return {"epoch": epoch, "ranks": from_all_ranks(scheduler, status)}

    def enter_queue(self, request: Any) -> None:
        """A request has no KV and waits for some: it will be computed, and cached, under the mask in force."""
        if not hasattr(request, _OWN_KEY):
            setattr(request, _OWN_KEY, request.extra_key)
        request.extra_key = cache_namespace(self.epochs.masks[-1], getattr(request, _OWN_KEY))
        if getattr(request, _BARRED, False):
            request.skip_radix_cache_insert = False
            setattr(request, _BARRED, False)


_live: LiveMask | None = None
"""This process's; None where softprune was asked for nothing."""


def begin(model: MaskedModel) -> None:
    """This process's model is loaded and masked as it was launched."""
    global _live
    _live = LiveMask(model)


def live() -> LiveMask:
    """This process's.

    Raises:
        ControlError: softprune was asked for nothing.
    """
    if _live is None:
        raise ControlError(409, "refused", "this process was not asked for masks")
    return _live


@contextmanager
def on_model_stream(scheduler: Any) -> Iterator[None]:
    """What is done here comes after all steps that are launched already and before any other, and the host waits for nothing."""
    if not _of(scheduler, "enable_overlap"):
        yield  # steps run on the current stream
        return
    with _of(scheduler, "forward_stream_ctx"):
        _of(scheduler, "forward_stream").wait_stream(_of(scheduler, "schedule_stream"))
        yield


def from_all_ranks(scheduler: Any, mine: Any) -> list[Any]:
    """Every rank's answer, in rank order; every rank has been sent the same request."""
    import torch.distributed as dist

    group = _of(scheduler, "tp_cpu_group")
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def stamp(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Before `Scheduler.run_batch`: a step is launched."""
    if _live is None:
        return
    requests, decoding = batch.reqs, batch.forward_mode.is_decode()
    tokens = len(requests) if decoding else batch.extend_num_tokens or 0
    _live.epochs.stamp((request.rid for request in requests), tokens, all_seen=decoding)
    if _live.model.collector is not None:
        _live.spans = spans = collecting.spans(batch, _live.model.collector)  # now, since running a batch changes it
        if spans and _live.model.collector.sampler is not None:
            with on_model_stream(scheduler):
                _live.model.collector.begin(sum(span.rows for span in spans), captured=decoding, spans=spans)


def collect(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """After `Scheduler.run_batch`: add the step to the statistics, behind it on its stream."""
    if _live is not None and _live.spans and _live.model.collector is not None:
        with on_model_stream(scheduler):
            _live.model.collector.step(_live.spans)
        _live.spans = []


def enter_queue(scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Before `Scheduler._add_request_to_queue`."""
    if _live is not None:
        _live.enter_queue(req)


def name_epochs(result: None, accumulator: Any, *, req: Any) -> None:
    """After the accumulator's `accept`: a finished request's epochs go with its last output."""
    if _live is None or not req.finished():
        return
    epochs = _live.epochs.finish(req.rid)
    reasons = accumulator.finished_reasons
    if epochs and accumulator.rids[-1:] == [req.rid]:
        reasons[-1] = {**(reasons[-1] or {}), EPOCHS_KEY: epochs}


def give_up(sender: Any, output: Any, *args: Any, **kwargs: Any) -> None:
    """Before `SenderWrapper.send_output`: a request that is given up has no last output."""
    if _live is not None and isinstance(output, _abort_class()):
        _live.epochs.finish(output.rid)


def stash_chunked(original: Callable[..., Any], scheduler: Any, req: Any) -> Any:
    """Around `Scheduler.stash_chunked_request`: a prefill that crosses a switch between two chunks goes on where it was."""
    if _live is None or not getattr(req, _BARRED, False) or not seams.exists(seams.CACHE_UNFINISHED):
        return original(scheduler, req)
    # In this version, the original returns before it says up to where the request's KV is there.
    slots = _of(scheduler, "req_to_token_pool.req_to_token")[req.req_pool_idx, : req.extend_range.end]
    req.prefix_indices = slots.to(dtype=torch.int64, copy=True)
    return None


def new_prefill(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `Scheduler.get_new_batch_prefill`: while a switch waits, only what has begun goes on."""
    if _live is None or not _live.draining:
        return original(scheduler, *args, **kwargs)
    held = [request for request in _waiting(scheduler) if not request.retracted_stain]
    scheduler.waiting_queue = [request for request in _waiting(scheduler) if request.retracted_stain]
    try:
        return original(scheduler, *args, **kwargs)
    finally:
        scheduler.waiting_queue = [*scheduler.waiting_queue, *held]


def end_drain(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """After `Scheduler.process_input_requests`, in every round of the scheduler's loop."""
    if _live is not None and _live.draining:
        _live.end_drain(scheduler)


_of = functools.partial(seams.attribute, seam="scheduler.state")


def _waiting(scheduler: Any) -> list[Any]:
    return list(_of(scheduler, "waiting_queue"))


def _batches(scheduler: Any) -> list[Any]:
    """All that have requests in them: in the next step, in the last one, and in those whose results are to come."""
    pending = [batch for batch, _ in _of(scheduler, "result_queue")] if _of(scheduler, "enable_overlap") else []
    found = [_of(scheduler, "running_batch"), _of(scheduler, "last_batch"), *pending]
    return [batch for batch in found if batch is not None and batch.reqs]


def _with_kv(scheduler: Any) -> list[Any]:
    """Requests that have KV, perhaps with some that have finished."""
    chunked = _of(scheduler, "chunked_req")
    return [*(request for batch in _batches(scheduler) for request in batch.reqs), *([] if chunked is None else [chunked])]


def _is_drained(scheduler: Any) -> bool:
    return not _with_kv(scheduler) and not any(request.retracted_stain for request in _waiting(scheduler))


def _paused() -> ControlError:
    return ControlError(409, "engine_is_paused", "in_flight=drain: somebody else has paused the engine; expected a running one")


def _bar_from_cache(request: Any) -> None:
    if not request.skip_radix_cache_insert:
        request.skip_radix_cache_insert = True
        setattr(request, _BARRED, True)


def _retract_all(scheduler: Any) -> None:
    """Take the KV of all running requests and queue them again, as SGLang does before it is given new weights."""
    paused, limit = _of(scheduler, "_engine_paused"), _of(scheduler, "max_queued_requests")
    scheduler.max_queued_requests = None  # it is for new requests; these would be given up
    try:
        scheduler.pause_generation(seams.PAUSE_REQUEST.resolve()(mode="retract"))
    finally:
        scheduler.max_queued_requests = limit
        if not paused:
            scheduler.continue_generation(seams.CONTINUE_REQUEST.resolve()(torch_empty_cache=False))


def _must_retract(scheduler: Any) -> bool:
    """Whether a prefill in chunks could get stuck across a switch.

    Of a request that caches nothing, SGLang frees no slots behind a sliding window before it decodes, and may then wait for them forever.
    """
    return bool(_of(scheduler, "is_hybrid_swa")) and _of(scheduler, "chunked_req") is not None


@functools.cache
def _abort_class() -> Any:
    return seams.ABORT.resolve()
