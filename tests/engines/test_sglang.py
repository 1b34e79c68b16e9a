"""SGLang with masked routers, in real server processes on the CPU: what `test_serving`, `test_equivalence` and `test_refusals` say of vLLM.

Run alone: pytest tests/engines/test_sglang.py
gpt-oss's attention is a stand-in here (see plugins/softprune_sglang_test_plugin.py); its routers, top-k and experts are SGLang's.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from softprune.bench.server import Server, free_port
from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.mask import ExpertMask
from softprune.mask_forms import build
from tests.conftest import Evidence, random_mask, random_prompts, saved
from tests.gpu import compare
from tests.gpu.engines import Row, Sglang
from tests.slicing import slice_checkpoint

pytestmark = pytest.mark.engine
PYTHON = Path(__file__).parent.parent.parent / ".venv-sglang" / "bin" / "python"
SGLANG = Sglang(on_gpu=False, python=str(PYTHON))
PROMPTS = random_prompts(80, 128, seed=41)
MAX_TOKENS = 4
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
    """Models and the sliced ones, side by side."""
    assert PYTHON.exists(), "no SGLang environment; `make setup` makes it"
    folder = tmp_path_factory.mktemp("sglang")
    for name in ("gpt-oss", "qwen3-moe"):
        (folder / name).symlink_to(models[name])
        slice_checkpoint(models[name], masks[name], folder / f"{name} sliced")
    return folder


@pytest.fixture(scope="module")
def files(masks: dict[str, ExpertMask], work: Path) -> dict[str, str]:
    return {name: saved(mask, work / f"{name}.json") for name, mask in masks.items()}


@pytest.fixture(scope="module")
def runs(work: Path, files: dict[str, str]) -> dict[str, Any]:
    """Every server's answers; two servers at a time."""

    def run(job: Job) -> dict[str, Any]:
        row, env = job
        with SGLANG.start(row, work, files, free_port(), env) as server:
            server.wait_ready()
            # Many prompts in batches for the routes, a few one by one for the comparisons.
            prompts, batch = (PROMPTS, 16) if row.probe else (PROMPTS[:12], 1)
            result = SGLANG.examine(row, server, prompts, batch, MAX_TOKENS)
            server.stop(grace=0)
            return result

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(run, RUNS.values()), strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("run", "mask", "top_k"),
    [
        ("gpt-oss masked", "gpt-oss", 4),
        ("uneven, top_k 2", "uneven", 2),
        ("qwen3-moe masked", "qwen3-moe", 4),
        ("tensor parallel", "gpt-oss", 4),
    ],
)
def test_pruned_experts_are_never_selected(runs: Any, masks: Any, evidence: Evidence, run: str, mask: str, top_k: int) -> None:
    """Over 10,000 tokens, every selection accounted for, layer by layer."""
    routes, found = runs[run]["routes"], compare.routes(runs[run], masks[mask], top_k)
    evidence(f"sglang_cpu.routes.{run}", found)
    assert found["pruned"] == 0
    assert found["tokens"] >= runs[run]["sent"] > 10_000  # SGLang's overlapped scheduler may compute a token past the last
    assert len(set(routes["tokens"])) == 1
    assert [sum(counts) for counts in routes["counts"]] == [found["tokens"] * top_k] * 4
    assert runs[run]["status"]["mask"] == {"hash": masks[mask].hash, "num_kept": masks[mask].num_kept}
    assert runs[run]["status"]["top_k"] == top_k


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


@pytest.fixture(scope="module")
def server(work: Path, files: dict[str, str]) -> Iterator[Server]:
    """One masked server."""
    with SGLANG.start(Row("served", "gpt-oss", "gpt-oss"), work, files, free_port()) as running:
        running.wait_ready()
        yield running
        running.stop(grace=0)


def test_status_says_what_is_served(server: Server, models: dict[str, Path], masks: Any) -> None:
    status, body = server.request("GET", "/softprune/v1/status")
    assert status == 200
    assert body["mask"]["hash"] == masks["gpt-oss"].hash
    assert body["fingerprint"] == fingerprint_of_checkpoint(models["gpt-oss"])
    assert (body["engine"], body["moe_backend"], body["device"]) == ("SGLang 0.5.17", "bf16/native", "cpu")


@pytest.mark.parametrize("key", ["", "wrong", "PROOF"])
@pytest.mark.parametrize("path", ["/status", "/routes", "", "/anything"])
def test_no_call_without_the_key(server: Server, path: str, key: str) -> None:
    status, body = server.request("GET", "/softprune/v1" + path, key=key)
    assert (status, body["error"]["type"]) == (401, "unauthorized")


def test_routes_without_the_probe(server: Server) -> None:
    status, body = server.request("GET", "/softprune/v1/routes")
    assert (status, body["error"]["type"]) == (409, "probe_is_off")


UPDATES = {
    "update_weights_from_disk": {"model_path": "elsewhere"},
    "update_weights_from_tensor": {"serialized_named_tensors": []},
    "update_weights_from_distributed": {"names": [], "dtypes": [], "shapes": []},
    "update_weights_from_ipc": {"zmq_handles": {}},
    "init_weights_update_group": {"master_address": "localhost", "master_port": 1, "rank_offset": 0, "world_size": 1},
    "weights_checker": {"action": "reset_tensors"},
    "release_memory_occupation": {},
    "resume_memory_occupation": {},
}


@pytest.mark.parametrize("call", UPDATES)
def test_calls_that_would_undo_the_mask_are_refused(server: Server, call: str) -> None:
    """The server says so and serves on, masked."""
    before = server.request("GET", "/softprune/v1/status")[1]
    status, body = server.request("POST", "/" + call, UPDATES[call])
    assert status == 400, body
    assert "is refused while softprune masks this engine's routers" in json.dumps(body)
    assert server.request("GET", "/softprune/v1/status")[1] == before
    assert len(SGLANG.ask(server, [PROMPTS[0]], 2)[0][0]) == 2


def test_the_key_is_not_logged(server: Server) -> None:
    assert "proof" not in server.text().replace("tests/gpu/proof", "")


STARTS: dict[str, tuple[dict[str, str], str]] = {
    "plugin missing in the front end": ({"SOFTPRUNE_TEST_BREAK": "main"}, "unrecognized arguments: --expert-mask"),
    "plugin raises in the front end": ({"SOFTPRUNE_TEST_RAISE": "main"}, "unrecognized arguments: --expert-mask"),
    "plugin missing in the scheduler": ({"SOFTPRUNE_TEST_BREAK": "child"}, "process 0: serves mask None, top_k None; expected sha256:"),
    "plugin raises in the scheduler": ({"SOFTPRUNE_TEST_RAISE": "child"}, "process 0: serves mask None, top_k None; expected sha256:"),
    "plugin not allowed": ({"SGLANG_PLUGINS": "aaa_softprune_test"}, "unrecognized arguments: --expert-mask"),
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


def wait_exit(server: Server, seconds: float = 120) -> str:
    """Wait for the server to give up; its output, or what it did instead."""
    deadline = time.monotonic() + seconds
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.3)
        if "Uvicorn running" in server.text():
            server.stop(grace=0)
            return "the server started, although it should have refused"
    ended = server.process.poll()
    server.stop(grace=0)
    return server.text() if ended not in (None, 0) else f"exit status {ended}\n{server.text()[-3000:]}"


@pytest.fixture(scope="module")
def starts(work: Path, models: dict[str, Path]) -> dict[str, str]:
    """Output of servers that were started with a mask and something missing; two at a time."""

    def start(name: str) -> str:
        path = saved(random_mask(models["gpt-oss"], 24), work / f"{name} mask.json")
        env = {key: path if value == "MASK" else value for key, value in STARTS[name][0].items()}
        return wait_exit(SGLANG.start(Row(name, "gpt-oss", "mask"), work, {"mask": path}, free_port(), env))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(STARTS, pool.map(start, STARTS), strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STARTS)
def test_server_refuses_to_start(starts: dict[str, str], name: str) -> None:
    assert STARTS[name][1] in starts[name], starts[name][-3000:]


def inside(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run SGLang's own Python; options of this pytest run are not for one inside it."""
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return subprocess.run([PYTHON, *arguments], capture_output=True, text=True, timeout=300, env={**own, **env}, check=False)


def test_offline_engine(work: Path, files: dict[str, str]) -> None:
    """`sglang.Engine(**engine_args(…))` serves the mask that a server serves."""
    script = Path(__file__).parent / "inside_sglang" / "offline_engine.py"
    plugins = os.pathsep.join(str(Path(__file__).parent / folder) for folder in ("stand_ins", "plugins"))
    env = {"PYTHONPATH": plugins, "SOFTPRUNE_TEST_CPU_ATTENTION": "1", "HF_HUB_OFFLINE": "1"}
    run = inside(str(script), str(work / "gpt-oss"), files["gpt-oss"], env=env)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    answers = json.loads(run.stdout.splitlines()[-1])
    assert answers["masked"]["mask"]["num_kept"] == [24] * 4
    assert answers["masked ids"] != answers["plain ids"]
    assert answers["broken"].startswith("MaskError: ")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("tests", "env"),
    [
        ("test_flags.py test_router.py", {"SOFTPRUNE_TEST_CPU_ATTENTION": "1"}),
        ("test_topk_kernel.py test_router_stats_kernel.py", {"TRITON_INTERPRET": "1"}),
    ],
)
def test_inside_sglang(tests: str, env: dict[str, str]) -> None:
    """Tests in SGLang's own process: its parser, its router, its kernel in Triton's interpreter."""
    folder = Path(__file__).parent / "inside_sglang"
    run = inside("-m", "pytest", "-q", *[str(folder / name) for name in tests.split()], env=env)
    print(run.stdout[-3000:])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "passed" in run.stdout
    assert "skipped" not in run.stdout
