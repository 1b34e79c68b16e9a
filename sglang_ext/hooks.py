"""What softprune registers with SGLang's hook registry, in every process that loads plugins.

SGLang logs a plugin that raises, and a hook that cannot be applied, and serves on. So nothing here is
trusted to have happened: the flags refuse unless every hook is in place, and the front end serves
nothing before every scheduler process has said which mask it serves.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from softprune.errors import SeamError
from softprune.sglang_ext import seams

logger = logging.getLogger("sglang.softprune")


def register() -> None:
    """Entry point of `sglang.srt.plugins`; runs in the front end and in every scheduler process.

    Never raises for a seam that is missing: a server that asks for nothing of softprune's is none of its business.
    """
    try:
        seams.check(seams.PLUGINS)
    except SeamError as error:
        logger.error("%s", error)  # the flags stay unknown, so the parser refuses them
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for kind, hooks in _hooks().items():
        for seam, hook in hooks:
            HookRegistry.register(seam.dotted, hook, HookType[kind])


def check_applied() -> None:
    """See that every hook is in place.

    Raises:
        SeamError: SGLang could not apply one; its log says why.
    """
    seams.check(seams.FRONT_END)
    for hooks in _hooks().values():
        for seam, hook in hooks:
            if not _wraps(seam.resolve(), hook):
                raise seam.missing(f"SGLang did not apply softprune's hook to {seam.dotted}; its log says why")


def _wraps(function: Any, hook: Callable[..., Any]) -> bool:
    """Whether a hook is in the chain of wrappers that SGLang's registry has put around a function."""
    function = getattr(function, "__func__", function)
    while function is not None:
        if any(cell.cell_contents is hook for cell in function.__closure__ or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


@functools.cache
def _hooks() -> dict[str, list[tuple[seams.Seam, Callable[..., Any]]]]:
    from softprune.sglang_ext import flags, routes, scheduler, worker

    refused = [(seam, worker.refused_update(name)) for name, seam in seams.WEIGHT_UPDATES.items()]
    if seams.exists(seams.BEGIN_WEIGHT_UPDATE):
        refused.append((seams.BEGIN_WEIGHT_UPDATE, worker.refused_update("begin_weight_update")))
    raising = [(seam, worker.refused_call(seam.target.rpartition(".")[2])) for seam in seams.RAISING]
    return {
        "AFTER": [
            (seams.ADD_CLI_ARGS, flags.add_flags),
            (seams.PREPARE_ARGS, flags.hide_key),
            (seams.INIT_INFO, worker.tell_front_end),
            (seams.PROCESS_INPUT, scheduler.end_drain),
            (seams.ACCEPT_OUTPUT, scheduler.name_epochs),
            (seams.RUN_BATCH, scheduler.collect),
        ],
        "BEFORE": [
            (seams.RUN_HTTP_SERVER, routes.add_control_api),
            (seams.BATCH_OUTPUT, routes.take_epochs),
            (seams.RUN_BATCH, scheduler.stamp),
            (seams.ADD_REQUEST, scheduler.enter_queue),
            (seams.SEND_OUTPUT, scheduler.give_up),
        ],
        "AROUND": [
            (seams.FROM_CLI_ARGS, flags.read_flags),
            (seams.LAUNCH_SUBPROCESSES, flags.launch_subprocesses),
            (seams.LAUNCH_SCHEDULERS, flags.launch_schedulers),
            (seams.LOAD_MODEL, worker.load_model),
            (seams.HANDLE_DUMPER_CONTROL, worker.answer),
            (seams.STASH_CHUNKED, scheduler.stash_chunked),
            (seams.NEW_PREFILL, scheduler.new_prefill),
            *refused,
            *raising,
        ],
    }
