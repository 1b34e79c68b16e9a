"""Fail closed: what cannot be masked is not served.

Run alone: pytest tests/engines/test_refusals.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprune.errors import RefusedError
from softprune.vllm_ext import proven
from tests.conftest import random_mask, saved
from tests.engines.harness import BASE_ENV, HERE, SERVER_ARGS, Starts, check_refused, outputs_of

pytestmark = pytest.mark.engine


def edited(path: str, out: Path, **changes: Any) -> str:
    """A mask file with fields replaced; `model__x` replaces `model.x`."""
    data = json.loads(Path(path).read_text())
    for name, value in changes.items():
        owner = data["model"] if name.startswith("model__") else data
        owner[name.removeprefix("model__")] = value
    out.write_text(json.dumps(data))
    return str(out)


@pytest.fixture(scope="module")
def configured(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM's configuration says to many command lines, in one process."""
    folder = tmp_path_factory.mktemp("configure")
    gpt_oss = models["gpt-oss"]
    good = saved(random_mask(gpt_oss, 24), folder / "good.json")
    other = saved(random_mask(models["qwen3-moe"], 8), folder / "other.json")
    foreign = "sha256:" + "0" * 64
    llama = folder / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}))
    (folder / "broken.json").write_text('{"format": ')
    (folder / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (folder / "large.json").write_text(" " * 16_000_001)
    server = ["--model", str(gpt_oss), *SERVER_ARGS, "--enforce-eager"]

    def mask(path: str) -> list[str]:
        return [*server, "--expert-mask", path]

    cases = {
        "good": mask(good),
        "no softprune flag": server,
        "top-k only": [*server, "--expert-top-k", "2"],
        "forced": [*mask(edited(good, folder / "forced.json", model__fingerprint=foreign)), "--expert-mask-force"],
        "equal top_k list": mask(edited(good, folder / "equal.json", top_k=[2, 2, 2, 2])),
        "no such file": mask(str(folder / "missing.json")),
        "not JSON": mask(str(folder / "broken.json")),
        "nested deep": mask(str(folder / "deep.json")),
        "over 16 MB": mask(str(folder / "large.json")),
        "another model": mask(other),
        "another fingerprint": mask(edited(good, folder / "foreign.json", model__fingerprint=foreign)),
        "forced but another model": [*mask(other), "--expert-mask-force"],
        "unknown format": mask(edited(good, folder / "format.json", format="other")),
        "unknown version": mask(edited(good, folder / "version.json", version=2)),
        "top_k above kept": mask(edited(good, folder / "kept.json", keep=[[1, 2, 3], None, None, None])),
        "top_k above the model's": [*server, "--expert-top-k", "5"],
        "top_k below 1": [*server, "--expert-top-k", "0"],
        "top_k twice": [*mask(edited(good, folder / "twice.json", top_k=2)), "--expert-top-k", "3"],
        "top_k per layer": mask(edited(good, folder / "list.json", top_k=[4, 2, 4, 4])),
        "top_k overridden": [*server, "--expert-top-k", "2", "--hf-overrides", '{"num_experts_per_tok": 3}'],
        "unknown architecture": ["--model", str(llama), "--skip-tokenizer-init", "--expert-mask", good],
        "probe without eager": ["--model", str(gpt_oss), *SERVER_ARGS, "--softprune-debug-routes"],
        "additional config": [*server, "--additional-config", json.dumps({"softprune": {"expert_mask": good}})],
        "additional config, wrong field": [*server, "--additional-config", json.dumps({"softprune": {"mask": good}})],
        "both ways": [*mask(good), "--additional-config", json.dumps({"softprune": {"expert_mask": good}})],
        "pipeline parallel": [*mask(good), "--pipeline-parallel-size", "2"],
        "expert parallel": [*mask(good), "--enable-expert-parallel"],
        "lora": [*mask(good), "--enable-lora"],
        "worker extension": [*mask(good), "--worker-extension-cls", "some.Extension"],
        "worker class": [*mask(good), "--worker-cls", "some.Worker"],
        "load format": [*mask(good), "--load-format", "dummy"],
        "model impl": [*mask(good), "--model-impl", "transformers"],
        "headless": [*mask(good), "--headless"],
        "headless by configuration": [*server, "--headless", "--additional-config", json.dumps({"softprune": {"expert_mask": good}})],
        "additional config, resolved field": [*server, "--additional-config", json.dumps({"softprune": {"top_k": 2}})],
        "additional config, wrong type": [*server, "--additional-config", json.dumps({"softprune": {"expert_top_k": True}})],
        "dtype": [*server, "--dtype", "float16", "--expert-mask", good],
    }
    (folder / "cases.json").write_text(json.dumps({"cases": cases, "modes": server}))
    run = subprocess.run(
        [sys.executable, str(HERE / "configure.py"), "cases.json", "out.json"], cwd=folder, capture_output=True, text=True, timeout=400,
        env={**os.environ, **BASE_ENV},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize(
    ("case", "top_k"),
    [("good", 4), ("top-k only", 2), ("forced", 4), ("equal top_k list", 2), ("additional config", 4)],
)
def test_accepted(configured: Any, case: str, top_k: int) -> None:
    outcome = configured["cases"][case]
    assert outcome["error"] is None
    assert outcome["worker"] == "softprune.vllm_ext.worker.ExpertMaskCPUWorker"
    assert outcome["hf_top_k"] == top_k


def test_without_flags_vllm_stays_as_it_is(configured: Any) -> None:
    assert configured["cases"]["no softprune flag"]["worker"] == "vllm.v1.worker.cpu_worker.CPUWorker"


REFUSED = {
    "no such file": "missing.json: found No such file or directory; expected a readable mask file",
    "not JSON": "expected JSON in UTF-8",
    "nested deep": "found JSON nested too deep",
    "over 16 MB": "found over 16 MB; expected at most 16 MB",
    "another model": "model.architecture: found Qwen3MoeForCausalLM; expected GptOssForCausalLM",
    "another fingerprint": "model.fingerprint: found sha256:0000",
    "forced but another model": "model.architecture: found Qwen3MoeForCausalLM",
    "unknown format": "format: found 'other'; expected \"softprune.expert-mask\"",
    "unknown version": "version: found 2; expected 1",
    "top_k above kept": "keep[0]: found 3 experts kept; expected at least top_k = 4",
    "top_k above the model's": "--expert-top-k: found 5; expected from 1 to the model's own top_k = 4",
    "top_k below 1": "--expert-top-k: found 0",
    "top_k twice": "--expert-top-k: found 3; expected 2, as the mask",
    "top_k per layer": "top_k: found a different number for each layer; expected one number",
    "top_k overridden": "hf_overrides.num_experts_per_tok: found 3; expected 2",
    "unknown architecture": "architectures: found ['LlamaForCausalLM']; expected one of GptOssForCausalLM",
    "probe without eager": "--softprune-debug-routes needs --enforce-eager",
    "additional config, wrong field": "additional_config.softprune: mask: found",
    "both ways": "--additional-config already has 'softprune'",
    "pipeline parallel": "--pipeline-parallel-size (2) is not proven",
    "expert parallel": "--enable-expert-parallel (True) is not proven",
    "lora": "--enable-lora (set) is not proven",
    "worker extension": "--worker-extension-cls (some.Extension) is not proven",
    "worker class": "--worker-cls (some.Worker) is not proven",
    "load format": "--load-format (dummy) is not proven",
    "model impl": "--model-impl (transformers) is not proven",
    "headless": "--headless is not proven",
    "headless by configuration": "--headless is not proven",
    "additional config, resolved field": "additional_config.softprune: top_k: found 2",
    "additional config, wrong type": "additional_config.softprune: expert_top_k: found True",
    "dtype": "--dtype (torch.float16) is not proven",
    "offline command": "SystemExit 2",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_clear_error(configured: Any, case: str) -> None:
    assert REFUSED[case] in configured["cases"][case]["error"]


@pytest.mark.parametrize("flag", [mode.flag for mode in proven.UNPROVEN_MODES])
def test_every_unproven_mode_is_refused_by_name(configured: Any, flag: str) -> None:
    assert configured["modes"][flag].startswith(f"{flag} (")


STARTS: Starts = {
    "plugin not allowed": ({"VLLM_PLUGINS": "aaa_softprune_test"}, "unrecognized arguments: --expert-mask"),
    "workers serve something else": ({"SOFTPRUNE_TEST_LIE": "1"}, "process 0: serves mask None, top_k 4; expected sha256:"),
}
"""A few that boot; tests/evidence has the others."""


@pytest.fixture(scope="module")
def starts(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outputs_of(STARTS, models["gpt-oss"], tmp_path_factory.mktemp("starts"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STARTS)
def test_server_refuses_to_start(starts: dict[str, str], name: str) -> None:
    check_refused(STARTS, starts, name)


def test_other_front_ends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    proven.check_front_end(Namespace())
    with pytest.raises(RefusedError, match="--grpc is not proven"):
        proven.check_front_end(Namespace(grpc=True))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(RefusedError, match="VLLM_USE_RUST_FRONTEND is not proven"):
        proven.check_front_end(Namespace())


def test_dtypes() -> None:
    for platform, dtype in (("cpu", torch.bfloat16), ("cpu", torch.float32), ("cuda", torch.bfloat16)):
        proven.check_dtype(dtype, platform)
    for platform, dtype in (("cpu", torch.float16), ("cuda", torch.float32), ("xpu", torch.float32)):
        with pytest.raises(RefusedError, match=f"--dtype \\(torch.{str(dtype)[6:]}\\) is not proven"):
            proven.check_dtype(dtype, platform)


def test_backends_and_their_top_k() -> None:
    """vLLM's triton_kernels routing takes a top_k that is a power of two; unproven backends are refused by name."""
    with pytest.raises(RefusedError, match="MoE backend mxfp4/FLASHINFER_TRTLLM_MXFP4_BF16 for .* on cuda is not proven"):
        proven.check_backend("cuda", "GptOssForCausalLM", "mxfp4/FLASHINFER_TRTLLM_MXFP4_BF16", 4)
    with pytest.raises(RefusedError, match="on rocm is not proven"):
        proven.check_backend("rocm", "GptOssForCausalLM", "mxfp4/TRITON", 4)
    for platform, architecture, backend in proven.PROVEN_BACKENDS:
        proven.check_backend(platform, architecture, backend, 4)
        if backend in proven.TRITON_KERNELS:
            with pytest.raises(RefusedError, match="top_k 3: MoE backend .* takes powers of two only"):
                proven.check_backend(platform, architecture, backend, 3)


def test_routers_that_do_not_ask_the_logits_are_refused() -> None:
    class RoutingSimulatorRouter:
        top_k = 4

    class FusedTopKRouter:
        top_k = 4

    proven.check_router("layer 0", FusedTopKRouter(), 4)
    with pytest.raises(RefusedError, match="layer 0: RoutingSimulatorRouter selects experts"):
        proven.check_router("layer 0", RoutingSimulatorRouter(), 4)
    with pytest.raises(RefusedError, match="the engine selects 4 experts a token; expected 2"):
        proven.check_router("layer 0", FusedTopKRouter(), 2)
