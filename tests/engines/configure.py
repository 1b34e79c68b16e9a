"""Builds vLLM's configuration from command lines, as its API server does, and reports what was refused.

    python configure.py CASES.json OUT.json        # CASES: {name: [arguments]}

The first half of a server's start: its own parser, `AsyncEngineArgs.from_cli_args`, `create_engine_config`.
"""

import importlib
import json
import sys


def make_parser():
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for module in ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"):
        try:
            return importlib.import_module(module).make_arg_parser(FlexibleArgumentParser())
        except ImportError:
            continue
    raise RuntimeError("no make_arg_parser")


def make_engine_parser():
    """As vLLM's offline commands have it: `vllm bench latency`, `vllm bench throughput`, …"""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def attempt(parser, arguments):
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        config = AsyncEngineArgs.from_cli_args(parser.parse_args(arguments)).create_engine_config()
    except SystemExit as error:
        return {"error": f"SystemExit {error.code}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None, "worker": config.parallel_config.worker_cls, "hf_top_k": config.model_config.hf_config.num_experts_per_tok}


def modes(arguments):
    """Every unproven mode, set on a real VllmConfig where this machine cannot be configured for it."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from softprune.errors import RefusedError
    from softprune.vllm_ext import proven

    results = {}
    for mode in proven.UNPROVEN_MODES:
        config = AsyncEngineArgs.from_cli_args(make_parser().parse_args(arguments)).create_engine_config()
        proven.check_modes(config)
        *parents, last = mode.path.split(".")
        owner = config
        for part in parents:
            owner = getattr(owner, part)
        value = next(v for v in (2, True, "other") if not mode.is_off(v) and isinstance(v, type(getattr(owner, last)) | object))
        object.__setattr__(owner, last, value)
        try:
            proven.check_modes(config)
            results[mode.flag] = None
        except RefusedError as error:
            results[mode.flag] = str(error)
    return results


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    parser = make_parser()
    outcome = {name: attempt(parser, arguments) for name, arguments in cases["cases"].items()}
    outcome["offline command"] = attempt(make_engine_parser(), cases["cases"]["good"])
    with open(sys.argv[2], "w") as file:
        json.dump({"cases": outcome, "modes": modes(cases["modes"])}, file)
