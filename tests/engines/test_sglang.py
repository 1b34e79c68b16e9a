"""SGLang with masked routers, in real server processes on the CPU: what `test_serving` and `test_refusals` say of vLLM.

Run alone: pytest tests/engines/test_sglang.py
gpt-oss's attention is a stand-in here (see plugins/softprune_sglang_test_plugin.py); its routers, top-k and experts are SGLang's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from softprune.bench.server import Server, free_port
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.mask import ExpertMask
from tests.conftest import Evidence, random_mask, saved
from tests.engines.harness import Starts, check_refused
from tests.engines.sglang_harness import MAX_TOKENS, PYTHON, SGLANG, check_routes, outputs_of, prompts, run_tests_inside
from tests.gpu.engines import Row

pytestmark = pytest.mark.engine
MASKED = Row("gpt-oss masked", "gpt-oss", "gpt-oss", probe=True)


@pytest.fixture(scope="module")
def mask(models: dict[str, Path]) -> ExpertMask:
    return random_mask(models["gpt-oss"], 24, seed=3)


@pytest.fixture(scope="module")
def work(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert PYTHON.exists(), "no SGLang environment; `make setup` makes it"
    folder = tmp_path_factory.mktemp("sglang")
    (folder / "gpt-oss").symlink_to(models["gpt-oss"])
    return folder


@pytest.fixture(scope="module")
def server(work: Path, mask: ExpertMask) -> Iterator[Server]:
    """One masked server, with the route probe."""
    with SGLANG.start(MASKED, work, {"gpt-oss": saved(mask, work / "gpt-oss.json")}, free_port()) as running:
        running.wait_ready()
        yield running
        running.stop(grace=0)


@pytest.mark.timeout(400)
def test_pruned_experts_are_never_selected(server: Server, mask: ExpertMask, evidence: Evidence) -> None:
    run = SGLANG.examine(MASKED, server, prompts("gpt-oss"), 16, MAX_TOKENS)
    evidence("sglang_cpu.routes.gpt-oss masked", check_routes(run, mask, 4))


def test_status_says_what_is_served(server: Server, models: dict[str, Path], mask: ExpertMask) -> None:
    status, body = server.request("GET", "/softprune/v1/status")
    assert status == 200
    assert body["mask"]["hash"] == mask.hash
    assert body["fingerprint"] == fingerprint_of_checkpoint(models["gpt-oss"])
    assert (body["engine"], body["moe_backend"], body["moe_tiles"], body["device"]) == ("SGLang 0.5.17", "bf16/native", "engine", "cpu")


@pytest.mark.parametrize("key", ["", "wrong", "PROOF"])
@pytest.mark.parametrize("path", ["/status", "/routes", "", "/anything"])
def test_no_call_without_the_key(server: Server, path: str, key: str) -> None:
    status, body = server.request("GET", "/softprune/v1" + path, key=key)
    assert (status, body["error"]["type"]) == (401, "unauthorized")


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
    assert len(SGLANG.ask(server, [list(range(30))], 2)[0][0]) == 2


def test_the_key_is_not_logged(server: Server) -> None:
    assert "proof" not in server.text().replace("tests/gpu/proof", "")


STARTS: Starts = {
    "plugin missing in the scheduler": ({"SOFTPRUNE_TEST_BREAK": "child"}, "process 0: serves mask None, top_k None; expected sha256:"),
    "plugin not allowed": ({"SGLANG_PLUGINS": "aaa_softprune_test"}, "unrecognized arguments: --expert-mask"),
}
"""A few; tests/evidence has the others."""


@pytest.fixture(scope="module")
def starts(work: Path) -> dict[str, str]:
    return outputs_of(STARTS, work)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STARTS)
def test_server_refuses_to_start(starts: dict[str, str], name: str) -> None:
    check_refused(STARTS, starts, name)


@pytest.mark.timeout(300)
def test_inside_sglang() -> None:
    """Tests in SGLang's own process: its parser, its router, and the rule by which its kernels choose tiles."""
    run_tests_inside("test_flags.py test_bench_flags.py test_router.py test_tiles.py", {"SOFTPRUNE_TEST_CPU_ATTENTION": "1"})


@pytest.mark.timeout(300)
def test_kernels_inside_sglang() -> None:
    """In Triton's interpreter; tests/evidence also has those with 128 experts."""
    run_tests_inside("test_topk_kernel.py test_router_stats_kernel.py test_sampling_kernels.py", {"TRITON_INTERPRET": "1"}, "-k", "not 128")
