"""softprune's command line flags in SGLang, and what they do to the server's arguments.

The way of a mask from the command line to a scheduler process: `--expert-mask` ->
`ServerArgs.json_model_override_args["softprune"]` -> the model's config in every process -> `worker`.
On the way back, every scheduler process sends what it serves with the message that it is ready.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from typing import Any

from softprune.checkpoint.families import config_of
from softprune.control import KEY_ENV
from softprune.control_api import check_served
from softprune.errors import RefusedError, SeamError
from softprune.flags import FLAGS, GROUP, KEY_HELP, KEY_OPTION, asked, asked_in
from softprune.launch import Launch, LaunchRequest
from softprune.sglang_ext import proven, seams
from softprune.sglang_ext.hooks import check_applied

logger = logging.getLogger("sglang.softprune")

CONFIG_KEY = "softprune"
"""Key under which the request travels in `json_model_override_args`, and so in the model's config."""
OVERRIDES = "json_model_override_args"

_served: list[dict[str, Any]] = []
"""In the front end: what the scheduler processes served when they were ready, by rank; empty where softprune was asked for nothing."""


def engine_args(
    model_path: str, expert_mask: str | None = None, expert_top_k: int | None = None, expert_mask_force: bool = False,
    debug_routes: bool = False, json_model_override_args: str = "{}", revision: str | None = None,
    expert_mask_state: str | None = None, control: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Arguments for `sglang.Engine`: `Engine(**engine_args("openai/gpt-oss-20b", expert_mask="keep24.json"), tp_size=2)`.

    Loads SGLang's plugins first, so that one that is missing is noticed here.

    Raises:
        RefusedError: softprune's plugin is not in place, or the request cannot be met.
        MaskError, CheckpointError: the mask cannot be used for this model.
    """
    seams.LOAD_PLUGINS.resolve()()
    check_applied()
    given = {
        "expert_mask": expert_mask, "expert_top_k": expert_top_k, "expert_mask_force": expert_mask_force, "debug_routes": debug_routes,
        "expert_mask_state": expert_mask_state, "control": control,
    }  # fmt: skip
    overrides = _with_request(json_model_override_args, asked(given), model_path, revision)
    chosen = {"model_path": model_path, OVERRIDES: overrides}
    return chosen if revision is None else {**chosen, "revision": revision}


def launch_in(overrides: str) -> Launch | None:
    """What a server was asked for, in its `json_model_override_args`.

    Raises:
        RefusedError: it was put there by something else than softprune.
    """
    request = json.loads(overrides or "{}").get(CONFIG_KEY)
    return None if request is None else Launch.parse(request, f"{OVERRIDES}.{CONFIG_KEY}")


def served_at_start() -> dict[str, Any] | None:
    """In the front end: what the first scheduler process served when it was ready; None if softprune was asked for nothing."""
    return _served[0] if _served else None


def add_flags(result: Any, parser: argparse.ArgumentParser) -> None:
    """After SGLang has added its own flags. With the plugin out of order, ours stay unknown and are refused."""
    try:
        check_applied()
    except SeamError as error:
        logger.error("%s", error)
        return
    group = parser.add_argument_group(*GROUP)
    for flag in FLAGS:
        if flag.value is None:
            group.add_argument(flag.option, action="store_true", help=flag.help)
        else:
            group.add_argument(flag.option, metavar=flag.value[0], type=flag.value[1], help=flag.help)
    group.add_argument(KEY_OPTION, metavar="KEY", help=KEY_HELP)


def read_flags(original: Callable[..., Any], cls: Any, args: argparse.Namespace) -> Any:
    """Around `ServerArgs.from_cli_args`: check what is asked, and send it along."""
    given = asked_in(args)
    key, args.softprune_key = getattr(args, "softprune_key", None), None
    if key:
        os.environ[KEY_ENV] = key  # not an argument: SGLang logs those
    if given:
        proven.check_front_end(args)
        args.json_model_override_args = _with_request(args.json_model_override_args, given, args.model_path, args.revision)
    return original(cls, args)


def hide_key(server_args: Any, argv: list[str]) -> None:
    """After `prepare_server_args`: newer versions keep the command line, and show it to whoever asks for the server's settings."""
    command, key = getattr(server_args, "_launch_command", None), os.environ.get(KEY_ENV)
    if isinstance(command, str) and key and any(KEY_OPTION in argument for argument in argv):
        server_args._launch_command = command.replace(key, "***")


def _with_request(overrides: str, given: dict[str, Any], model: str, revision: str | None) -> str:
    try:
        own = json.loads(overrides or "{}")
    except ValueError as error:
        raise RefusedError(f"{OVERRIDES}: found no valid JSON ({error}); expected a JSON object") from None
    if CONFIG_KEY in own:
        raise RefusedError(f"{OVERRIDES} already has {CONFIG_KEY!r}, which is softprune's own")
    if not given:
        return overrides
    launch = LaunchRequest.parse(given, "softprune's flags").resolve(config_of(model, revision), model)
    return json.dumps({**launch.with_top_k(own, OVERRIDES), CONFIG_KEY: launch.model_dump()})


def launch_subprocesses(original: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the start of all processes: refuse a front end that starts its scheduler processes in another way."""
    server_args = kwargs["server_args"] if "server_args" in kwargs else args[0]
    if launch_in(seams.setting(server_args, OVERRIDES)) is not None:
        ours = seams.LAUNCH_SCHEDULERS.resolve().__func__
        if getattr(cls._launch_scheduler_processes, "__func__", None) is not ours:
            raise proven.refusal(f"{cls.__name__}, which starts scheduler processes in its own way,")
    return original(cls, *args, **kwargs)


def launch_schedulers(original: Callable[..., Any], cls: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the start of the scheduler processes: refuse unproven modes, and go on only if each serves what was asked for."""
    launch = launch_in(seams.setting(server_args, OVERRIDES))
    if launch is None:
        return original(cls, server_args, *args, **kwargs)
    check_applied()
    proven.check_modes(server_args)
    result, processes = original(cls, server_args, *args, **kwargs)
    wait = seams.attribute(result, "wait_for_ready", seams.LAUNCH_SCHEDULERS.name)

    def wait_for_ready() -> Any:
        answer = wait()
        infos = seams.attribute(result, "scheduler_infos", seams.LAUNCH_SCHEDULERS.name)
        try:
            if len(infos) != len(processes):
                raise RefusedError(f"{len(infos)} of {len(processes)} scheduler processes said what they serve")
            statuses = [info.pop(CONFIG_KEY, None) for info in infos]  # not for GET /server_info, which asks for no key
            for rank, status in enumerate(statuses):
                check_served(launch, rank, status)
            _served[:] = statuses
        except RefusedError:
            for process in processes:
                process.kill()
            raise
        return answer

    result.wait_for_ready = wait_for_ready
    return result, processes
