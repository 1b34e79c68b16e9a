"""SGLang with masked routers on the CPU, with everything to compare it with: no mask, sliced checkpoints, two ranks, and mutations.

Run alone: pytest tests/evidence/test_sglang.py
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from softprune.bench.server import free_port
from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.rewrite import rewrite
from softprune.mask import ExpertMask
from softprune.mask_forms import build
from tests.conftest import Evidence, random_mask, saved
from tests.engines.harness import Starts, check_refused
from tests.engines.sglang_harness import (
    HERE,
    INSIDE,
    MAX_TOKENS,
    PYTHON,
    SGLANG,
    check_routes,
    inside,
    outputs_of,
    prompts,
    run_tests_inside,
)
from tests.gpu import compare
from tests.gpu.engines import Row

pytestmark = pytest.mark.engine
STABLE = {"SOFTPRUNE_TEST_STABLE_TOPK": "1"}
Job = tuple[Row, dict[str, str]]

RUNS: dict[str, Job] = {
    "gpt-oss masked": (Row("gpt-oss masked", "gpt-oss", "gpt-oss", probe=True), {}),
    "gpt-oss unmasked": (Row("gpt-oss unmasked", "gpt-oss", probe=True), {}),
    "gpt-oss all": (Row("gpt-oss all", "gpt-oss", "all"), {}),
    "gpt-oss plain": (Row("gpt-oss plain", "gpt-oss", patched=False), {}),
    "gpt-oss one layer unmasked": (Row("gpt-oss one layer unmasked", "gpt-oss", "gpt-oss", probe=True), {"SOFTPRUNE_TEST_SKIP_LAYER": "2"}),
    "uneven, top_k 2": (Row("uneven, top_k 2", "gpt-oss", "uneven", probe=True), {}),
    "gpt-oss masked, stable": (Row("gpt-oss masked, stable", "gpt-oss", "gpt-oss"), STABLE),
    "gpt-oss sliced, stable": (Row("gpt-oss sliced, stable", "gpt-oss sliced"), STABLE),
    "tensor parallel": (
        Row("tensor parallel", "gpt-oss", "gpt-oss", ("--tp-size", "2"), probe=True),
        {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
    ),
    "qwen3-moe masked": (Row("qwen3-moe masked", "qwen3-moe", "qwen3-moe", probe=True), {}),
    "qwen3-moe masked, stable": (Row("qwen3-moe masked, stable", "qwen3-moe", "qwen3-moe"), STABLE),
    "qwen3-moe sliced, stable": (Row("qwen3-moe sliced, stable", "qwen3-moe sliced"), STABLE),
    "qwen3-moe all": (Row("qwen3-moe all", "qwen3-moe", "qwen3-moe all"), {}),
    "qwen3-moe plain": (Row("qwen3-moe plain", "qwen3-moe", patched=False), {}),
}


@pytest.fixture(scope="module")
def masks(models: dict[str, Path]) -> dict[str, ExpertMask]:
    def keep_all(model: Path) -> ExpertMask:
        spec = spec_of(read_config(model))
        return build(spec, [None] * spec.num_layers, None, {}, "keep all")

    return {
        "gpt-oss": random_mask(models["gpt-oss"], 24, seed=3),
        "uneven": random_mask(models["gpt-oss"], [20, 4, 32, 11], seed=5, top_k=2),
        "qwen3-moe": random_mask(models["qwen3-moe"], 9, seed=4),
        "all": keep_all(models["gpt-oss"]),
        "qwen3-moe all": keep_all(models["qwen3-moe"]),
    }


@pytest.fixture(scope="module")
def work(models: dict[str, Path], masks: dict[str, ExpertMask], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and what `rewrite` makes of them, side by side."""
    assert PYTHON.exists(), "no SGLang environment; `make setup` makes it"
    folder = tmp_path_factory.mktemp("sglang")
    for name in ("gpt-oss", "qwen3-moe"):
        (folder / name).symlink_to(models[name])
        rewrite(models[name], masks[name], folder / f"{name} sliced")
    return folder


@pytest.fixture(scope="module")
def files(masks: dict[str, ExpertMask], work: Path) -> dict[str, str]:
    return {name: saved(mask, work / f"{name}.json") for name, mask in masks.items()}


@pytest.fixture(scope="module")
def runs(work: Path, files: dict[str, str]) -> dict[str, Any]:
    """Every server's answers; two servers at a time."""
    asked = {row.model: prompts(row.model) for row, _ in RUNS.values()}

    def run(job: Job) -> dict[str, Any]:
        row, env = job
        with SGLANG.start(row, work, files, free_port(), env) as server:
            server.wait_ready()
            # Many prompts in batches for the routes, a few one by one for the comparisons.
            number, batch = (None, 16) if row.probe else (12, 1)
            result = SGLANG.examine(row, server, asked[row.model][:number], batch, MAX_TOKENS)
            server.stop(grace=0)
            return result

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(run, RUNS.values()), strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("run", "mask", "top_k"),
    [
        ("uneven, top_k 2", "uneven", 2),
        ("qwen3-moe masked", "qwen3-moe", 4),
        ("tensor parallel", "gpt-oss", 4),
    ],
)
def test_pruned_experts_are_never_selected(runs: Any, masks: Any, evidence: Evidence, run: str, mask: str, top_k: int) -> None:
    evidence(f"sglang_cpu.routes.{run}", check_routes(runs[run], masks[mask], top_k))


def test_unmasked_they_are_selected(runs: Any, masks: Any, evidence: Evidence) -> None:
    found = compare.routes(runs["gpt-oss unmasked"], masks["gpt-oss"], 4)
    evidence("sglang_cpu.routes.unmasked", found)
    assert found["pruned_experts_selected_share"] == 1.0
    assert runs["gpt-oss unmasked"]["status"]["mask"] is None


def test_one_unmasked_layer_is_noticed(runs: Any, masks: Any) -> None:
    """A mutation: the probe sees what the mask misses."""
    counts = runs["gpt-oss one layer unmasked"]["routes"]["counts"]
    pruned = [sum(counts[layer][i] for i in masks["gpt-oss"].pruned(layer)) for layer in range(4)]
    assert pruned[2] > 0
    assert pruned[0] == pruned[1] == pruned[3] == 0


@pytest.mark.parametrize("model", ["gpt-oss", "qwen3-moe"])
def test_masked_is_the_sliced_checkpoint(runs: Any, evidence: Evidence, model: str) -> None:
    """To the last bit, with a top-k on both sides that breaks ties by id, as triton_kernels does on a GPU."""
    found = compare.logprobs(runs[f"{model} masked, stable"], runs[f"{model} sliced, stable"])
    evidence(f"sglang_cpu.masked_over_sliced.{model}", found)
    assert (found["max"], found["equal_share"], found["same_generated"]) == (0.0, 1.0, True)


@pytest.mark.parametrize("model", ["gpt-oss", "qwen3-moe"])
def test_keep_all_is_sglang_without_softprune(runs: Any, evidence: Evidence, model: str) -> None:
    found = compare.logprobs(runs[f"{model} all"], runs[f"{model} plain"])
    evidence(f"sglang_cpu.keep_all_over_unpatched.{model}", found)
    assert (found["max"], found["same_generated"]) == (0.0, True)


def test_a_mask_changes_the_output(runs: Any) -> None:
    """The comparisons above can fail."""
    short = {**runs["gpt-oss masked"], "tokens": runs["gpt-oss masked"]["tokens"][:12]}
    assert compare.logprobs(short, runs["gpt-oss plain"])["max"] > 0.1


def test_routes_without_the_probe(work: Path, files: dict[str, str]) -> None:
    with SGLANG.start(Row("no probe", "gpt-oss", "gpt-oss"), work, files, free_port()) as server:
        server.wait_ready()
        status, body = server.request("GET", "/softprune/v1/routes")
        server.stop(grace=0)
    assert (status, body["error"]["type"]) == (409, "probe_is_off")


STARTS: Starts = {
    "plugin missing in the front end": ({"SOFTPRUNE_TEST_BREAK": "main"}, "unrecognized arguments: --expert-mask"),
    "plugin raises in the front end": ({"SOFTPRUNE_TEST_RAISE": "main"}, "unrecognized arguments: --expert-mask"),
    "plugin raises in the scheduler": ({"SOFTPRUNE_TEST_RAISE": "child"}, "process 0: serves mask None, top_k None; expected sha256:"),
    "scheduler serves something else": ({"SOFTPRUNE_TEST_LIE": "1"}, "process 0: serves mask None, top_k 4; expected sha256:"),
    "mask vanishes": ({"SOFTPRUNE_TEST_VANISH": "MASK"}, "found No such file or directory; expected a readable mask file"),
    "seam gone in the front end": (
        {"SOFTPRUNE_TEST_REMOVE": "sglang.srt.entrypoints.engine:Engine._launch_scheduler_processes"},
        "unrecognized arguments: --expert-mask",
    ),
    "seam gone in the scheduler": (
        {"SOFTPRUNE_TEST_REMOVE": "sglang.srt.models.qwen3_moe:Qwen3MoeSparseMoeBlock"},
        "seam 'model.qwen3_moe_block' does not hold in SGLang 0.5.17",
    ),
}


@pytest.fixture(scope="module")
def starts(work: Path) -> dict[str, str]:
    return outputs_of(STARTS, work)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STARTS)
def test_server_refuses_to_start(starts: dict[str, str], name: str) -> None:
    check_refused(STARTS, starts, name)


def test_offline_engine(work: Path, files: dict[str, str]) -> None:
    """`sglang.Engine(**engine_args(…))` serves the mask that a server serves."""
    plugins = os.pathsep.join(str(HERE / folder) for folder in ("stand_ins", "plugins"))
    env = {"PYTHONPATH": plugins, "SOFTPRUNE_TEST_CPU_ATTENTION": "1", "HF_HUB_OFFLINE": "1"}
    run = inside(str(INSIDE / "offline_engine.py"), str(work / "gpt-oss"), files["gpt-oss"], env=env)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    answers = json.loads(run.stdout.splitlines()[-1])
    assert answers["masked"]["mask"]["num_kept"] == [24] * 4
    assert answers["masked ids"] != answers["plain ids"]
    assert answers["broken"].startswith("MaskError: ")


@pytest.mark.timeout(300)
def test_kernels_inside_sglang() -> None:
    """In Triton's interpreter: the top-k that gpt-oss uses on a GPU, and the kernel that adds up what routers chose."""
    run_tests_inside("test_topk_kernel.py test_router_stats_kernel.py test_sampling_kernels.py", {"TRITON_INTERPRET": "1"})
