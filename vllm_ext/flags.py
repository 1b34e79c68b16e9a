"""softprune's command line flags in vLLM, and what they do to the engine's configuration.

The way of a mask from the command line to a worker:
`--expert-mask` -> `EngineArgs.additional_config["softprune"]` -> `VllmConfig.additional_config.launch` ->
`softprune.vllm_ext.worker`, which `ParallelConfig.worker_cls` names. A worker process that cannot
import softprune therefore cannot start, whatever became of the plugin in it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import os
from collections import UserDict
from collections.abc import Mapping
from typing import Any

from softprune.checkpoint.families import config_of
from softprune.control import KEY_ENV
from softprune.errors import RefusedError, SeamError
from softprune.flags import FLAGS, GROUP, KEY_HELP, KEY_OPTION, asked, asked_in
from softprune.launch import Launch, LaunchRequest
from softprune.vllm_ext import proven, seams

logger = logging.getLogger("vllm.softprune")

CONFIG_KEY = "softprune"
"""Key under which the request travels in `additional_config`; also how `LLM(...)` asks for a mask."""

EPOCHS_KEY = "softprune"
"""Key under which a finished request's epochs travel to the front end, in vLLM's one field with free JSON."""

MIDDLEWARE = "softprune.vllm_ext.routes.ControlApi"


class AdditionalConfig(UserDict[str, Any]):
    """The user's own `additional_config`, with what softprune was asked for beside it.

    vLLM hashes this object into the key of its compile cache. The mask stays out of it: it is data in
    a tensor, so all masks, and a server without softprune, run the same compiled graph. A router that is
    given a bias is another graph; `routers_changed` keeps the two apart.
    """

    def __init__(self, own: Mapping[str, Any], launch: Launch, routers_changed: bool) -> None:
        super().__init__({**own, CONFIG_KEY: "router bias added"} if routers_changed else own)
        self.launch = launch

    def compute_hash(self) -> str:
        """Called by vLLM unless the object is empty."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()


def launch_of(vllm_config: Any) -> Launch:
    """What softprune was asked for.

    Raises:
        SeamError: the configuration lost it on its way through vLLM.
    """
    config = seams.attribute(vllm_config, "additional_config", seams.ADDITIONAL_CONFIG.name)
    if not isinstance(config, AdditionalConfig):
        found = f"additional_config is a {type(config).__name__} without softprune's request"
        raise SeamError(seams.ADDITIONAL_CONFIG.name, seams.engine(), found)
    return config.launch


def register() -> None:
    """Entry point of `vllm.general_plugins`; runs in every process of vLLM, and may run twice.

    Never raises for a seam that is missing: a server that asks for nothing of softprune's is none of
    its business. The flags and the engine's configuration refuse instead, as soon as something is asked.
    """
    try:
        add_cli_args = seams.ADD_CLI_ARGS.resolve()
        from_cli_args = seams.FROM_CLI_ARGS.resolve()
        create_engine_config = seams.CREATE_ENGINE_CONFIG.resolve()
    except SeamError as error:
        logger.error("%s", error)  # the flags stay unknown, so the parser refuses them
        _refuse_engine_config(error)
        return
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_softprune", False):
        return
    EngineArgs._softprune = True

    @functools.wraps(add_cli_args)
    def add_flags(parser: Any) -> Any:
        parser = add_cli_args(parser)
        _add_flags(parser)
        return parser

    def read_flags(cls: Any, args: argparse.Namespace) -> Any:
        engine_args = from_cli_args.__func__(cls, args)
        _into_additional_config(engine_args, args)
        return engine_args

    @functools.wraps(create_engine_config)
    def configure(self: Any, *args: Any, **kwargs: Any) -> Any:
        launch = _prepare(self)
        vllm_config = create_engine_config(self, *args, **kwargs)
        if launch is not None:
            _install(vllm_config, launch)
        return vllm_config

    EngineArgs.add_cli_args = staticmethod(add_flags)
    EngineArgs.from_cli_args = classmethod(read_flags)
    EngineArgs.create_engine_config = configure


def llm_args(
    expert_mask: str | None = None, expert_top_k: int | None = None, expert_mask_force: bool = False, debug_routes: bool = False
) -> dict[str, Any]:
    """Arguments for `vllm.LLM`: `LLM(model, **llm_args(expert_mask="keep24.json"))`.

    The same as `additional_config={"softprune": {…}}`, and safer: it puts softprune in place itself, so that
    a VLLM_PLUGINS that leaves softprune out cannot make the mask go unnoticed.
    """
    register()
    given = {
        "expert_mask": expert_mask, "expert_top_k": expert_top_k, "expert_mask_force": expert_mask_force, "debug_routes": debug_routes,
    }  # fmt: skip
    return {"additional_config": {CONFIG_KEY: asked(given)}}


def _refuse_engine_config(error: SeamError) -> None:
    """With the plugin out of order, `LLM(additional_config=…)` must not run unmasked."""
    from vllm.engine.arg_utils import EngineArgs

    original = getattr(EngineArgs, "create_engine_config", None)
    if original is None:
        return

    @functools.wraps(original)
    def configure(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.additional_config, dict) and CONFIG_KEY in self.additional_config:
            raise error
        return original(self, *args, **kwargs)

    EngineArgs.create_engine_config = configure


class _Flag(argparse.Action):
    """A softprune flag: checks the seams, and puts the control API (with its check at start-up) in place."""

    def __init__(self, *args: Any, is_switch: bool = False, **kwargs: Any) -> None:
        self.is_switch = is_switch
        kwargs["nargs"] = 0 if is_switch else None
        super().__init__(*args, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        try:
            seams.check(seams.FRONT_END)
        except SeamError as error:
            parser.error(f"{option_string}: {error}")
        if not hasattr(namespace, "middleware"):
            parser.error(
                f"{option_string} is for vLLM's API server. With other commands that build an engine, "
                f"""use --additional-config '{{"{CONFIG_KEY}": {{"expert_mask": "FILE"}}}}'"""
            )
        namespace.middleware = [*(name for name in namespace.middleware if name != MIDDLEWARE), MIDDLEWARE]
        setattr(namespace, self.dest, True if self.is_switch else values)


class _KeyFlag(argparse.Action):
    """The key goes to the environment and not into the arguments, since vLLM logs those."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        os.environ[KEY_ENV] = values


def _add_flags(parser: Any) -> None:
    group = parser.add_argument_group(*GROUP)
    for flag in FLAGS:
        value = {} if flag.value is None else {"metavar": flag.value[0], "type": flag.value[1]}
        default = False if flag.value is None else None
        group.add_argument(flag.option, action=_Flag, is_switch=flag.value is None, default=default, help=flag.help, **value)
    group.add_argument(KEY_OPTION, action=_KeyFlag, metavar="KEY", help=KEY_HELP)


def _into_additional_config(engine_args: Any, args: argparse.Namespace) -> None:
    given = asked_in(args)
    config = dict(engine_args.additional_config or {})
    if given and CONFIG_KEY in config:
        raise RefusedError(f"--additional-config already has {CONFIG_KEY!r}; expected either it or softprune's own flags")
    if given or CONFIG_KEY in config:
        proven.check_front_end(args)
    if given:
        engine_args.additional_config = {**config, CONFIG_KEY: given}


def _prepare(engine_args: Any) -> Launch | None:
    """Check what is asked against the model, before vLLM makes its configuration."""
    config = engine_args.additional_config
    if not isinstance(config, dict) or CONFIG_KEY not in config:
        return None
    seams.check(seams.FRONT_END)
    request = LaunchRequest.parse(config[CONFIG_KEY], f"additional_config.{CONFIG_KEY}")
    model = str(engine_args.hf_config_path or engine_args.model)
    launch = request.resolve(config_of(model, engine_args.revision), str(engine_args.model))
    if launch.debug_routes and not engine_args.enforce_eager:
        raise RefusedError("--softprune-debug-routes needs --enforce-eager: inside CUDA graphs and compiled code it would see nothing")
    overrides = engine_args.hf_overrides or {}
    if isinstance(overrides, dict):
        engine_args.hf_overrides = launch.with_top_k(overrides, "hf_overrides")
    elif launch.top_k != launch.model_top_k:
        raise RefusedError("--expert-top-k together with a callable hf_overrides is not supported; set num_experts_per_tok there")
    return launch


def _install(vllm_config: Any, launch: Launch) -> None:
    """Refuse unproven modes, and put our worker class in vLLM's place."""
    from softprune.vllm_ext import routers
    from softprune.vllm_ext.worker import WORKERS

    own = dict(vllm_config.additional_config)
    if own.pop(CONFIG_KEY, None) is None:
        raise SeamError(seams.ADDITIONAL_CONFIG.name, seams.engine(), "VllmConfig did not take over EngineArgs.additional_config")
    vllm_config.additional_config = AdditionalConfig(own, launch, routers_changed=routers.adds_bias(vllm_config.model_config.hf_config))
    proven.check_modes(vllm_config)
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in WORKERS:
        raise RefusedError(
            f"--worker-cls ({parallel.worker_cls}) is not proven together with an expert mask in {seams.engine()}; "
            f"proven: {', '.join(WORKERS)}"
        )
    parallel.worker_cls = WORKERS[parallel.worker_cls]
    # By name: the scheduler's module is for the engine core, which is another process.
    name = "ExpertMaskAsyncScheduler" if vllm_config.scheduler_config.async_scheduling else "ExpertMaskScheduler"
    vllm_config.scheduler_config.scheduler_cls = f"softprune.vllm_ext.scheduler.{name}"
