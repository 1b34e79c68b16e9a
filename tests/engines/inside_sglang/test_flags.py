"""softprune's flags in SGLang's real parser, through its real plugin loader, and what they make of ServerArgs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import ServerArgs, prepare_server_args

from softprune.errors import CheckpointError, MaskError, RefusedError, SoftpruneError
from softprune.sglang_ext import engine_args, flags, hooks, proven, seams
from tests.conftest import random_mask, saved


def server(model: Path, *args: str) -> list[str]:
    return ["--model-path", str(model), "--device", "cpu", "--attention-backend", "intel_amx", "--skip-tokenizer-init", *args]


def overrides(argv: list[str]) -> dict[str, Any]:
    return json.loads(prepare_server_args(argv).json_model_override_args)


def test_every_hook_is_in_place() -> None:
    hooks.check_applied()


def test_a_hook_that_sglang_could_not_apply_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang only logs it; the flags are then unknown, so the parser refuses them."""
    monkeypatch.setattr(Engine, "_launch_scheduler_processes", Engine._launch_scheduler_processes.__wrapped__)
    with pytest.raises(SoftpruneError, match="seam 'engine.launch_schedulers' does not hold in SGLang .*did not apply"):
        hooks.check_applied()
    with pytest.raises(SystemExit):
        prepare_server_args(["--model-path", "x", "--expert-mask", "y"])


def test_a_mask_goes_into_the_models_overrides(models: dict[str, Path], keep24: str) -> None:
    found = overrides(server(models["gpt-oss"], "--expert-mask", keep24, "--json-model-override-args", '{"rope_theta": 1.5}'))
    assert found["rope_theta"] == 1.5
    assert found["softprune"]["expert_mask"] == keep24
    assert found["softprune"]["mask_hash"].startswith("sha256:")
    assert "num_experts_per_tok" not in found


def test_top_k_goes_through_the_models_config(models: dict[str, Path]) -> None:
    args = prepare_server_args(server(models["gpt-oss"], "--expert-top-k", "2"))
    assert json.loads(args.json_model_override_args)["num_experts_per_tok"] == 2
    from sglang.srt.configs.model_config import ModelConfig

    config = ModelConfig.from_server_args(args).hf_config
    assert (config.num_experts_per_tok, config.softprune["model_top_k"]) == (2, 4)


def test_yaml_takes_the_flags_too(models: dict[str, Path], keep24: str, tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text(f"expert-mask: {keep24}\nexpert-top-k: 2\n")
    found = overrides(server(models["gpt-oss"], "--config", str(tmp_path / "server.yaml")))
    assert (found["softprune"]["expert_mask"], found["num_experts_per_tok"]) == (keep24, 2)


def test_without_flags_nothing_changes(models: dict[str, Path]) -> None:
    assert prepare_server_args(server(models["gpt-oss"])).json_model_override_args == "{}"


def test_the_key_stays_out_of_the_arguments(models: dict[str, Path], keep24: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPRUNE_KEY", "")
    args = prepare_server_args(server(models["gpt-oss"], "--expert-mask", keep24, "--softprune-key", "s3cret"))
    assert "s3cret" not in str(args)
    assert os.environ["SOFTPRUNE_KEY"] == "s3cret"


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (("--expert-mask", "missing.json"), MaskError, "missing.json: found No such file or directory; expected a readable mask file"),
        (("--expert-mask", "OTHER"), MaskError, "model.architecture: found Qwen3MoeForCausalLM; expected GptOssForCausalLM"),
        (("--expert-top-k", "5"), RefusedError, "--expert-top-k: found 5; expected from 1 to the model's own top_k = 4"),
        (("--expert-top-k", "0"), RefusedError, "--expert-top-k: found 0"),
        (("--expert-top-k", "2", "--json-model-override-args", '{"num_experts_per_tok": 3}'), RefusedError, "found 3; expected 2"),
        (("--expert-top-k", "2", "--json-model-override-args", "{"), RefusedError, "found no valid JSON"),
        (("--expert-top-k", "2", "--json-model-override-args", '{"softprune": {}}'), RefusedError, "already has 'softprune'"),
    ],
)
def test_refused(models: dict[str, Path], tmp_path: Path, args: tuple[str, ...], kind: type[Exception], message: str) -> None:
    other = saved(random_mask(models["qwen3-moe"], 8), tmp_path / "other.json")
    with pytest.raises(kind) as caught:
        prepare_server_args(server(models["gpt-oss"], *[other if arg == "OTHER" else arg for arg in args]))
    assert message in str(caught.value)


def test_a_mask_for_other_weights_is_refused_unless_forced(models: dict[str, Path], keep24: str, tmp_path: Path) -> None:
    data = json.loads(Path(keep24).read_text())
    data["model"]["fingerprint"] = "sha256:" + "0" * 64
    (tmp_path / "foreign.json").write_text(json.dumps(data))
    argv = server(models["gpt-oss"], "--expert-mask", str(tmp_path / "foreign.json"))
    with pytest.raises(MaskError, match="fingerprint"):
        prepare_server_args(argv)
    assert overrides([*argv, "--expert-mask-force"])["softprune"]["expert_mask_force"] is True


def test_an_unknown_architecture_is_refused(keep24: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2})
    )
    with pytest.raises(CheckpointError, match="LlamaForCausalLM"):
        prepare_server_args(server(tmp_path, "--expert-mask", keep24))


def test_a_request_by_hand_is_refused(models: dict[str, Path]) -> None:
    """Only what softprune has checked may travel: a hand-made request has not been."""
    args = prepare_server_args(server(models["gpt-oss"], "--json-model-override-args", '{"softprune": {"expert_mask": "keep24.json"}}'))
    with pytest.raises(RefusedError, match="json_model_override_args.softprune: mask_hash"):
        flags.launch_schedulers(must_not_run, None, args, None)


MODES_OF_THIS_VERSION = [mode for mode in proven.MODES_OF_SOME_VERSIONS if hasattr(ServerArgs, mode.path)]


def must_not_run(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("scheduler processes were started")


@pytest.mark.parametrize("mode", [*proven.UNPROVEN_MODES, *MODES_OF_THIS_VERSION], ids=lambda mode: mode.flag)
def test_every_unproven_mode_is_refused_by_name(
    models: dict[str, Path], keep24: str, mode: proven.Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, setting = prepare_server_args(server(models["gpt-oss"], "--expert-mask", keep24)), seams.setting
    assert mode.is_off(setting(args, mode.path)), f"{mode.flag} is not off by default: {setting(args, mode.path)}"
    value = "overlap" if mode.path == "startup_weight_load_mode" else 7
    monkeypatch.setattr(seams, "setting", lambda args, name: value if name == mode.path else setting(args, name))
    with pytest.raises(RefusedError, match=f"^{mode.flag} \\({value}\\) is not proven together with an expert mask in SGLang"):
        flags.launch_schedulers(must_not_run, None, args, None)


def test_a_real_flag_is_read_as_resolved(models: dict[str, Path], keep24: str) -> None:
    args = prepare_server_args(server(models["gpt-oss"], "--expert-mask", keep24, "--pp-size", "2"))
    with pytest.raises(RefusedError, match=r"^--pipeline-parallel-size \(2\) is not proven"):
        flags.launch_schedulers(must_not_run, None, args, None)


@pytest.mark.parametrize("variable", ["SGLANG_RUST_SERVER", "SGLANG_SIMULATE_UNIFORM_EXPERTS", "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS"])
def test_other_servers_and_simulated_routing_are_refused(
    models: dict[str, Path], keep24: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    args = prepare_server_args(server(models["gpt-oss"], "--expert-mask", keep24))
    monkeypatch.setenv(variable, "1")
    with pytest.raises(RefusedError, match=f"{variable} is not proven"):
        prepare_server_args(server(models["gpt-oss"], "--expert-mask", keep24))
    with pytest.raises(RefusedError, match=f"{variable} is not proven"):
        flags.launch_schedulers(must_not_run, None, args, None)


@pytest.mark.parametrize("flag", ["--use-ray", "--encoder-only", "--grpc-mode", "--smg-grpc-mode"])
def test_front_ends_with_other_processes_are_refused_at_once(models: dict[str, Path], keep24: str, flag: str) -> None:
    with pytest.raises(RefusedError, match=f"{flag} is not proven"):
        prepare_server_args(server(models["gpt-oss"], "--expert-mask", keep24, flag))


def test_an_engine_that_starts_its_own_schedulers_is_refused(models: dict[str, Path], keep24: str) -> None:
    """As SGLang's RayEngine does, past the hook."""

    class OwnWay(Engine):
        @classmethod
        def _launch_scheduler_processes(cls, *args: Any, **kwargs: Any) -> Any:
            return must_not_run()

    asked = engine_args(str(models["gpt-oss"]), expert_mask=keep24)
    with pytest.raises(RefusedError, match="OwnWay, which starts scheduler processes in its own way, is not proven"):
        OwnWay(**asked, device="cpu", attention_backend="intel_amx", skip_tokenizer_init=True)


def test_the_key_is_taken_out_of_a_command_line_that_sglang_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept:
        _launch_command = "--expert-mask m.json --softprune-key s3cret"

    monkeypatch.setenv("SOFTPRUNE_KEY", "s3cret")
    flags.hide_key(Kept, ["--softprune-key", "s3cret"])
    assert Kept._launch_command == "--expert-mask m.json --softprune-key ***"


def test_backends_and_their_top_k() -> None:
    """triton_kernels' routing takes a top_k that is a power of two; unproven backends are refused by name."""
    for backend in ("mxfp4/marlin", "mxfp4/flashinfer_mxfp4", "mxfp4/deep_gemm", "bf16/triton"):
        with pytest.raises(RefusedError, match=f"MoE backend {backend} for .* on cuda is not proven"):
            proven.check_backend("cuda", "GptOssForCausalLM", backend, 4)
    with pytest.raises(RefusedError, match="on hip is not proven"):
        proven.check_backend("hip", "GptOssForCausalLM", "mxfp4/triton_kernel", 4)
    proven.check_backend("cuda", "GptOssForCausalLM", "mxfp4/triton_kernel", 4)
    with pytest.raises(RefusedError, match="top_k 3: MoE backend .* takes powers of two only"):
        proven.check_backend("cuda", "GptOssForCausalLM", "mxfp4/triton_kernel", 3)


def test_engine_args_checks_before_anything_starts(models: dict[str, Path], keep24: str) -> None:
    made = engine_args(str(models["gpt-oss"]), expert_mask=keep24, expert_top_k=2)
    assert json.loads(made["json_model_override_args"])["num_experts_per_tok"] == 2
    asked = engine_args(str(models["gpt-oss"]), control=True, expert_mask_state=str(Path(keep24).parent / "state.json"))
    request = json.loads(asked["json_model_override_args"])["softprune"]
    assert (request["control"], request["mask_hash"], Path(request["expert_mask_state"]).name) == (True, None, "state.json")
    with pytest.raises(MaskError):
        engine_args(str(models["gpt-oss"]), expert_mask="missing.json")
