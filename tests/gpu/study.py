"""How many tokens a second does the study's way of profiling make: Transformers, BF16 copies of the weights, hooks?

    python -m tests.gpu.study WORK_DIR OUT.json [--seconds 150] [--cpu]

Needs PyTorch and Transformers only; neither an engine nor `accelerate`, and nothing else on the card: the 20B shape takes 40 GB in BF16.
Batches of one prompt of 2,048 random tokens pass through the model as they are ("forward"), and with a hook on every MoE layer that does
again what REAP needs (spec/metrics.md 3.2) for 128 tokens of a batch, the study's default, or for all. All figures are tokens passed.
An engine that samples 1 token in 16 measures 128 of 2,048 as well, so "sampled_128" is the figure to compare with.
The study's first pass, which EAFT-REAP adds, is left out, and so is all of the output layer but one position: both favour the study.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

from softprune.checkpoint.headers import TensorIndex
from softprune.checkpoint.mxfp4 import dequantize
from softprune.checkpoint.synth import synth_checkpoint
from softprune.evaluate.reference_stats import output_norms

LENGTH, TOKEN_IDS = 2048, 480
FIGURES = {"forward": None, "sampled_128": 128, "all": LENGTH}
EXPERTS = ("eager", "grouped_mm", "batched_mm")
FAILURES = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError, OSError)


def load(base: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A gpt-oss with plain weights on a device, MXFP4 decoded there expert by expert: neither a copy on disk nor `accelerate` is needed."""
    config = AutoConfig.from_pretrained(base)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    index, missing = TensorIndex(base), dict(model.named_parameters())
    with torch.no_grad():
        for name in [name for name in index if not name.endswith("_scales")]:
            found, target = index.load(name), missing.pop(name.removesuffix("_blocks"))
            if not name.endswith("_blocks"):
                target.copy_(found)
                continue
            scales = index.load(name.removesuffix("_blocks") + "_scales")
            with torch.device(device):
                for expert in range(len(target)):
                    target[expert] = dequantize(*(one[expert : expert + 1].to(device) for one in (found, scales)))[0]
    if missing:
        raise ValueError(f"{base}: no {', '.join(missing)}")
    return model.eval().requires_grad_(False)


def load_by_transformers(base: Path, device: str) -> Any:
    """The same by Transformers' own dequantisation, on the host first: placing weights on a card as they are read needs `accelerate`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True))
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def hooks(model: Any, tokens: int | None) -> Iterator[dict[str, torch.Tensor]]:
    """Inside the block, passes add up float64 [num_layers, num_experts] of `tokens` strided tokens of a batch; None adds no hook."""
    mlps = [layer.mlp for layer in model.model.layers]
    size = len(mlps), model.config.num_local_experts
    sums = {name: torch.zeros(size, dtype=torch.float64, device=model.device) for name in ("count", "gate", "norm", "gate_norm")}

    def hook(layer: int) -> Any:
        def add(mlp: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden = inputs[0].flatten(0, -2)
            taken = min(tokens or 0, len(hidden))
            hidden = hidden[torch.arange(taken, device=hidden.device) * len(hidden) // taken]
            logits = torch.nn.functional.linear(hidden, mlp.router.weight, mlp.router.bias)
            top, chosen = logits.topk(model.config.num_experts_per_tok)
            gate, norm = top.softmax(-1).double(), output_norms(mlp.experts, hidden, chosen).double()
            for name, values in {"count": torch.ones_like(gate), "gate": gate, "norm": norm, "gate_norm": gate * norm}.items():
                sums[name][layer].index_add_(0, chosen.flatten(), values.flatten())

        return add

    handles = [mlp.register_forward_pre_hook(hook(layer)) for layer, mlp in enumerate(mlps)] if tokens else []
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def speed(model: Any, tokens: int | None, seconds: float) -> float:
    """Tokens a second, in as many batches as fill the time, after one to warm up; what the hooks added up is checked."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    draw = torch.Generator().manual_seed(0)
    with hooks(model, tokens) as sums:
        batches, began = -1, 0.0
        while batches < 1 or time.monotonic() - began < seconds:
            model(input_ids=torch.randint(TOKEN_IDS, (1, LENGTH), generator=draw).to(model.device), use_cache=False, logits_to_keep=1)
            wait()
            batches += 1
            began = began or time.monotonic()
        taken = time.monotonic() - began
    expected = (batches + 1) * (tokens or 0) * model.config.num_experts_per_tok
    if not (sums["count"].sum(1) == expected).all() or not all(one.isfinite().all() for one in sums.values()):
        raise ValueError(f"sums of {tokens} tokens a batch: {sums}; expected {expected} choices in each layer, and finite numbers")
    return batches * LENGTH / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    deadline, device, base = time.monotonic() + args.seconds, "cpu" if args.cpu else "cuda", args.work / "base"
    if not base.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        synth_checkpoint("tiny" if args.cpu else "gpt-oss-20b", base, "bf16" if args.cpu else "mxfp4", seed=0)
    errors: dict[str, str] = {}
    result: dict[str, Any] = {
        "what": "tests/gpu/study.py", "versions": {name: version(name) for name in ("softprune", "torch", "transformers")},
        "python": platform.python_version(), "gpu": None if args.cpu else torch.cuda.get_device_name(), "tokens_a_batch": LENGTH,
        "tok_s": {}, "errors": errors,
    }  # fmt: skip
    began, model = time.monotonic(), None
    try:
        model = load(base, device)
    except FAILURES as error:
        errors["load"] = repr(error)[:1000]
    if model is None:
        torch.cuda.empty_cache()
        began, model = time.monotonic(), load_by_transformers(base, device)
    result["load_s"] = round(time.monotonic() - began, 1)
    default = model.config._experts_implementation
    result.update(experts_by_default=default, attention=model.config._attn_implementation)
    print(json.dumps(result), flush=True)
    for experts in (default, *(one for one in EXPERTS if one != default)):
        for figure, tokens in FIGURES.items():
            try:
                # Two batches and the figure's own time have to fit.
                if time.monotonic() > deadline - 10:
                    raise TimeoutError(f"skipped: less than 10 of {args.seconds:g} s were left")
                model.set_experts_implementation(experts)
                found = speed(model, tokens, seconds=1 if args.cpu else 5)
                result["tok_s"].setdefault(experts, {})[figure] = round(found, 1)
                said = f"{found:,.0f} tokens/s"
            except FAILURES as error:
                said = errors[f"{experts} {figure}"] = repr(error)[:1000]
            print(f"{experts} {figure}: {said[:300]}", flush=True)
            if not args.cpu:
                result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
                torch.cuda.empty_cache()
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
