"""Shapes of the checkpoints that `softprune checkpoint synth` can make."""

from __future__ import annotations

from typing import Any


def gpt_oss(num_layers: int, num_experts: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """A gpt-oss config.json; fields not given here are those of the published models."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": num_layers,
        "num_local_experts": num_experts,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": vocab,
        "layer_types": ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(num_layers)],
        "sliding_window": 128,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }  # fmt: skip


def qwen3_moe(
    num_layers: int, num_experts: int, top_k: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, Any]:
    """A Qwen3-MoE config.json."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": num_layers,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_size": hidden,
        "intermediate_size": 4 * intermediate,
        "moe_intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": vocab,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 40960,
        "max_window_layers": num_layers,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }


def mixtral(num_layers: int, num_experts: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """A Mixtral config.json."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": num_layers,
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": vocab,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": gpt_oss(num_layers=4, num_experts=32, hidden=128, intermediate=128, heads=4, kv_heads=2, vocab=1024),
    "gpt-oss-20b": gpt_oss(num_layers=24, num_experts=32, hidden=2880, intermediate=2880, heads=64, kv_heads=8, vocab=201088),
    "gpt-oss-120b": gpt_oss(num_layers=36, num_experts=128, hidden=2880, intermediate=2880, heads=64, kv_heads=8, vocab=201088),
    "qwen3-moe-tiny": qwen3_moe(num_layers=4, num_experts=16, top_k=4, hidden=128, intermediate=64, heads=4, kv_heads=2, vocab=1024),
    "mixtral-tiny": mixtral(num_layers=4, num_experts=8, hidden=128, intermediate=64, heads=4, kv_heads=2, vocab=1024),
}
MXFP4_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
}
"""`quantization_config` of the published gpt-oss checkpoints."""
