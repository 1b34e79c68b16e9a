"""vLLM's scheduler under a mask that can be switched live: the process that launches steps.

`SchedulerConfig.scheduler_cls` names one of these classes. Between two steps, a switch asks every worker whether it can
put the new mask in force, and only then lets them; whatever was launched before runs under the old mask, since workers
take calls in order.

KV is cached under a name that has the mask in it (`cache_namespace`). A request gets its name when it comes in, another
one at a switch as long as none of its KV is computed, and one of its own, under which nobody finds anything, if it crosses
a switch with KV of two masks.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from softprune.control import ControlError, refusal_among
from softprune.runtime.epochs import Epochs, cache_namespace
from softprune.vllm_ext import seams
from softprune.vllm_ext.flags import EPOCHS_KEY, launch_of

_NAMESPACED = re.compile(r"softprune:(?:unpruned|sha256:[0-9a-f]{64}):(.*)", re.DOTALL)


_NONCES = itertools.count()
"""Tell the answers to one vote from those to another."""


class ExpertMaskScheduling:
    """Mixed into vLLM's schedulers; knows which mask every step runs under.

    Attributes:
        epochs: the masks so far, and every request's.
    """

    requests: dict[str, Any]
    vllm_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        seams.check(seams.SCHEDULER)
        super().__init__(*args, **kwargs)
        self.epochs = Epochs(launch_of(self.vllm_config).mask_hash, seams.call_ids)
        self._ended_by_front_end: set[str] = set()
        _install_in_engine_core()

    def add_request(self, request: Any) -> None:
        """A request comes in; its KV will be cached under the mask in force."""
        if request.request_id not in self.requests:
            request.softprune_own_salt = own_salt(request.cache_salt)
            self._name_cache(request)
            if request.sampling_params is not None and request.sampling_params.stop:
                self._ended_by_front_end.add(request.request_id)
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """A step is launched: stamp the epoch of every request in it."""
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        first_time = output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids
        self.epochs.stamp(output.num_scheduled_tokens, output.total_num_scheduled_tokens, all_seen=not first_time)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """A step's results: requests with stop strings name their epochs each time, since the front end decides that they have ended."""
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        if self._ended_by_front_end:
            for output in (one for client in outputs.values() for one in client.outputs):
                if output.request_id in self._ended_by_front_end and output.kv_transfer_params is None:
                    output.kv_transfer_params = {EPOCHS_KEY: self.epochs.running(output.request_id)}
        return outputs

    def begin_epoch(self, mask_hash: str | None) -> int:
        """Every step launched from now on runs under another mask.

        Args:
            mask_hash: its hash; None for no mask.

        Returns:
            The epoch.
        """
        before, epoch = self.epochs.masks[-1], self.epochs.switch(mask_hash)
        for request in self.requests.values() if mask_hash != before else ():
            if request.num_computed_tokens:
                self._seal_cache(request)
            else:
                self._name_cache(request)
        return epoch

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        self._name_cache(request)  # all of its KV will be computed again

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._ended_by_front_end.discard(request.request_id)
        parameters, *rest = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        return {**(parameters or {}), EPOCHS_KEY: self.epochs.finish(request.request_id)}, *rest

    def _name_cache(self, request: Any) -> None:
        """Cache a request's KV under the mask in force."""
        name = cache_namespace(self.epochs.masks[-1], request.softprune_own_salt)
        if request.cache_salt != name:
            request.cache_salt = name
            request.block_hashes.clear()
            request.update_block_hashes()

    def _seal_cache(self, request: Any) -> None:
        """Let a request that holds KV insert no more that anybody could find.

        A block's hash covers those before it, so from the last computed block on, hashes become its own.
        """
        request.cache_salt = f"softprune:crossed:{self.epochs.current}:{request.request_id}"
        first = max(0, request.num_computed_tokens // self.hash_block_size - 1)  # type: ignore[attr-defined]
        for i in range(first, len(request.block_hashes)):
            request.block_hashes[i] = hashlib.sha256(f"{request.cache_salt}:{i}".encode()).digest()


class ExpertMaskScheduler(ExpertMaskScheduling, Scheduler):
    """vLLM's scheduler, masked."""


class ExpertMaskAsyncScheduler(ExpertMaskScheduling, AsyncScheduler):
    """vLLM's scheduler that runs a step ahead, masked."""


def own_salt(cache_salt: str | None) -> str | None:
    """The user's own part of a name that `cache_namespace` made."""
    match = _NAMESPACED.fullmatch(cache_salt or "")
    return (match[1] or None) if match else cache_salt


@functools.cache
def _install_in_engine_core() -> None:
    """Give vLLM's engine core the call that the control API makes, and name caches where block hashes are first computed."""
    core: Any = seams.ENGINE_CORE.resolve()
    preprocess = seams.PREPROCESS.resolve()

    @functools.wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        # In the thread that takes requests in, so that a long prompt is hashed once and not by the scheduler again.
        if isinstance(self.scheduler, ExpertMaskScheduling):  # a process may run other engines beside a masked one
            request.cache_salt = cache_namespace(self.scheduler.epochs.masks[-1], request.cache_salt)
        return preprocess(self, request)

    core.preprocess_add_request = preprocess_add_request
    core.softprune_call = call


def call(core: Any, what: str, arguments: dict[str, Any]) -> Any:
    """What the control API asks of the process that launches steps, between two of them.

    Args:
        core: vLLM's engine core.
        what: "status", "request", "tokens" or "switch".
        arguments: of the call.
    """
    epochs: Epochs = core.scheduler.epochs
    if what == "status":
        return epochs.status()
    if what == "request":
        return epochs.of(arguments["name"])
    if what == "tokens":
        return epochs.tokens
    return _switch(core, arguments["text"])


def _switch(core: Any, text: str | None) -> dict[str, Any]:
    """Vote, then commit: {"epoch", "ranks"}, or {"refused": `ControlError.answer`} with the old mask in force everywhere."""
    nonce = next(_NONCES)
    try:
        votes = core.collective_rpc("softprune_stage", args=(text, nonce))
        refused = refusal_among([vote["refused"] for vote in votes])
        # A call that failed on one process leaves the others' answers to it unread: they would be taken for votes.
        if any(vote["nonce"] != nonce for vote in votes):
            refused = ControlError(500, "ranks_out_of_step", "the processes answer an earlier call; restart the server").answer
    except Exception as error:  # noqa: BLE001 - the old mask stays in force, whatever it was
        refused = ControlError.of(error).answer
    if refused:
        core.collective_rpc("softprune_drop")
        return {"refused": refused}
    ranks = core.collective_rpc("softprune_commit")
    return {"epoch": core.scheduler.begin_epoch((ranks[0]["mask"] or {}).get("hash")), "ranks": ranks}
