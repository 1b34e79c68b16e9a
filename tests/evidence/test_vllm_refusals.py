"""Fail closed: vLLM servers that do not start, for every seam and every way in which the plugin can be missing.

Run alone: pytest tests/evidence/test_vllm_refusals.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from softprune.vllm_ext import seams
from tests.engines.harness import Starts, check_refused, outputs_of

pytestmark = pytest.mark.engine


def sabotage(seam: seams.Seam) -> dict[str, str]:
    """How a test removes a seam: a callable loses the parameter it is known by, anything else goes."""
    module, _, path = seam.target.partition(":")
    if seam.parameters and seam not in (seams.ADD_CLI_ARGS, seams.FROM_CLI_ARGS, seams.PROCESS_WEIGHTS):
        return {"SOFTPRUNE_TEST_DROP": f"{module}:{path}:{seam.parameters[0]}"}
    return {"SOFTPRUNE_TEST_REMOVE": seam.target}


STARTS: Starts = {
    **{f"seam {seam.name}": (sabotage(seam), f"seam '{seam.name}' does not hold in vLLM ") for seam in seams.FRONT_END + seams.WORKER},
    "plugin raises": ({"SOFTPRUNE_TEST_RAISE": "1"}, "planted: softprune's plugin raises"),
    "plugin missing in the front end": ({"SOFTPRUNE_TEST_BREAK": "main"}, "unrecognized arguments: --expert-mask"),
    "plugin missing in the workers": (
        {"SOFTPRUNE_TEST_BREAK": "child"},
        "Can't pickle <class 'softprune.vllm_ext.flags.AdditionalConfig'>",
    ),
    "routing is simulated": ({"VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random"}, "would select experts without asking the routers"),
    "mask vanishes": ({"SOFTPRUNE_TEST_VANISH": "MASK"}, "found No such file or directory; expected a readable mask file"),
}


@pytest.fixture(scope="module")
def starts(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outputs_of(STARTS, models["gpt-oss"], tmp_path_factory.mktemp("starts"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STARTS)
def test_server_refuses_to_start(starts: dict[str, str], name: str) -> None:
    check_refused(STARTS, starts, name)
