"""Where each supported architecture keeps its routers and experts.

A family is a row in a table, not a class hierarchy: adding an architecture is adding a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from softprune.errors import CheckpointError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One architecture in one storage form.

    Attributes:
        name: softprune's name for it.
        architecture: the entry of `architectures` in config.json.
        storage: how experts are stored; "mxfp4" means blocks and scales, "bf16" plain matrices.
        num_experts_key, top_k_keys: config fields; the first of `top_k_keys` is the one that
            engines read, all of them are kept equal.
        router_weight, router_bias: tensor names with `{layer}`; the weight is [num_experts, hidden].
        expert_tensors: names with `{layer}` of tensors whose first dimension is the expert, or,
            when `expert_index` is set, names with `{layer}` and `{expert}`, one tensor an expert.
    """

    name: str
    architecture: str
    storage: Literal["mxfp4", "bf16"]
    num_experts_key: str
    top_k_keys: tuple[str, ...]
    router_weight: str
    router_bias: str | None
    expert_tensors: tuple[str, ...]
    expert_index: bool = False

    def moe_layers(self, config: Config) -> tuple[int, ...]:
        """Indices of the decoder layers that hold experts, ascending."""
        num_layers = int(config["num_hidden_layers"])
        dense = set(config.get("mlp_only_layers") or ())
        step = int(config.get("decoder_sparse_step") or 1)
        return tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)


_GPT_OSS = "model.layers.{layer}.mlp."
_QWEN = "model.layers.{layer}.mlp."
_MIXTRAL = "model.layers.{layer}.block_sparse_moe."

FAMILIES: tuple[Family, ...] = (
    Family(
        name="gpt-oss-mxfp4",
        architecture="GptOssForCausalLM",
        storage="mxfp4",
        num_experts_key="num_local_experts",
        top_k_keys=("num_experts_per_tok", "experts_per_token"),
        router_weight=_GPT_OSS + "router.weight",
        router_bias=_GPT_OSS + "router.bias",
        expert_tensors=tuple(
            _GPT_OSS + "experts." + t
            for t in (
                "gate_up_proj_blocks",
                "gate_up_proj_scales",
                "gate_up_proj_bias",
                "down_proj_blocks",
                "down_proj_scales",
                "down_proj_bias",
            )
        ),
    ),
    Family(
        name="gpt-oss-bf16",
        architecture="GptOssForCausalLM",
        storage="bf16",
        num_experts_key="num_local_experts",
        top_k_keys=("num_experts_per_tok", "experts_per_token"),
        router_weight=_GPT_OSS + "router.weight",
        router_bias=_GPT_OSS + "router.bias",
        expert_tensors=tuple(_GPT_OSS + "experts." + t for t in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")),
    ),
    Family(
        name="qwen3-moe",
        architecture="Qwen3MoeForCausalLM",
        storage="bf16",
        num_experts_key="num_experts",
        top_k_keys=("num_experts_per_tok",),
        router_weight=_QWEN + "gate.weight",
        router_bias=None,
        expert_tensors=tuple(_QWEN + "experts.{expert}." + t + ".weight" for t in ("gate_proj", "up_proj", "down_proj")),
        expert_index=True,
    ),
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        storage="bf16",
        num_experts_key="num_local_experts",
        top_k_keys=("num_experts_per_tok",),
        router_weight=_MIXTRAL + "gate.weight",
        router_bias=None,
        expert_tensors=tuple(_MIXTRAL + "experts.{expert}." + t + ".weight" for t in ("w1", "w2", "w3")),
        expert_index=True,
    ),
)

ARCHITECTURES = tuple(dict.fromkeys(family.architecture for family in FAMILIES))


SPEC_FIELDS = ("architectures", "num_hidden_layers", "num_experts", "num_local_experts", "num_experts_per_tok",
               "mlp_only_layers", "decoder_sparse_step")  # fmt: skip
"""Fields of config.json that `spec_of` may read."""


@dataclass(frozen=True)
class ModelSpec:
    """What a mask needs to know of a model; no tensor is read for it.

    Attributes:
        architecture: e.g. "GptOssForCausalLM".
        moe_layers: decoder layer indices that hold experts; a mask's `keep[i]` belongs to `moe_layers[i]`.
        num_experts: experts in each MoE layer.
        top_k: experts chosen per token by the model as published.
    """

    architecture: str
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int

    @property
    def num_layers(self) -> int:
        """Number of MoE layers (the `num_layers` of a mask file)."""
        return len(self.moe_layers)


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(str(path), "", "no such file", "a checkpoint folder with a config.json") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), "", f"no valid JSON ({error})", "a JSON object") from None
    if not isinstance(config, dict):
        raise CheckpointError(str(path), "", type(config).__name__, "a JSON object")
    return config


def config_of(model: str, revision: str | None = None) -> dict[str, Any]:
    """The model's own config.json, from a folder or from the Hub's cache, without any override.

    Args:
        model: a checkpoint folder or a Hub name.
        revision: of the Hub's repository.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    except OSError:
        return read_config(model)
    return dict(config)


def family_of(config: Config, source: str = "config.json") -> Family:
    """The family that a config belongs to.

    Raises:
        CheckpointError: the architecture, or the form in which it is stored, is not in the table.
    """
    architectures = list(config.get("architectures") or [])
    quantization = (config.get("quantization_config") or {}).get("quant_method")
    storage = {"mxfp4": "mxfp4", None: "bf16"}.get(quantization)
    for family in FAMILIES:
        if family.architecture in architectures and family.storage == storage:
            return family
    if not set(architectures) & set(ARCHITECTURES):
        raise CheckpointError(source, "architectures", str(architectures), f"one of {', '.join(ARCHITECTURES)}")
    known = sorted(f.storage for f in FAMILIES if f.architecture in architectures)
    raise CheckpointError(source, "quantization_config.quant_method", repr(quantization), f"a checkpoint stored as {' or '.join(known)}")


def spec_of(config: Config, source: str = "config.json") -> ModelSpec:
    """The model's shape as a mask sees it.

    The storage form does not matter here, so quantised forms outside the families table are accepted
    as long as the architecture is known.

    Raises:
        CheckpointError: unknown architecture, or a field is missing or not a positive number.
    """
    architectures = list(config.get("architectures") or [])
    family = next((f for f in FAMILIES if f.architecture in architectures), None)
    if family is None:
        raise CheckpointError(source, "architectures", str(architectures), f"one of {', '.join(ARCHITECTURES)}")
    numbers = {}
    for key in ("num_hidden_layers", family.num_experts_key, family.top_k_keys[0]):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(source, key, repr(value), "a positive whole number")
        numbers[key] = value
    return ModelSpec(
        architecture=family.architecture,
        moe_layers=family.moe_layers(config),
        num_experts=numbers[family.num_experts_key],
        top_k=numbers[family.top_k_keys[0]],
    )
