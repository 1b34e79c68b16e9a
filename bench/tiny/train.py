"""Train the small gpt-oss on one GPU, and write it as BF16 and as MXFP4.

    python -m softprune.bench.tiny.train DATA.npz.xz OUT_DIR [--seconds 150] [--seed 0]

DATA comes from `softprune.bench.tiny.batches`. The model is Transformers' own, with its grouped matrix products and flex attention, in
BF16; its experts, norms and loss are compiled. A checkpoint is kept every minute in OUT_DIR/state, and the same command goes on from it.
The learning rate falls to zero over `--seconds` (or `--tokens`, whichever is nearer to its end); the last quarter is trained through MXFP4.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from softprune.bench.tiny import PACKS, batches
from softprune.bench.tiny.balance import Balance
from softprune.bench.tiny.batches import Stream
from softprune.bench.tiny.masters import Masters
from softprune.bench.tiny.weights import config, write
from softprune.errors import InputError

logger = logging.getLogger("softprune.tiny")
BALANCE = 0.01
"""Weight of the load-balancing loss, as in arXiv 2101.03961."""
BIAS_STEP = 1e-3
"""What a router's bias of an expert that is chosen less (more) than the average rises (falls) by in a step, as in arXiv 2408.15664: the
load-balancing loss alone hardly moves an expert that is not chosen at all. Falls with the learning rate."""
UNSPOKEN = 0.3
"""Weight of tokens that the assistant did not write, beside 1 for those that it did."""
MXFP4_FROM, WARM_UP = 0.75, 0.02
"""Parts of the run: experts go through MXFP4 from here on; the learning rate rises until there."""
LOG_STEPS = 20


@dataclass(frozen=True)
class Options:
    """How a run is made; recorded in its result.

    Attributes:
        seconds: of training, without compilation.
        tokens: end after so many, if time does not end it before.
        seed: of the weights and of the order of the blocks.
        sequences: in a step, the same number of each pack.
        learning_rate: its highest.
        device: "cuda", or "cpu" to try this, in float32.
        experts, attention: Transformers' `experts_implementation` and `attn_implementation`; of the latter, those that know sinks.
        compiled: whether to compile.
        keep_every: seconds between checkpoints.
        heldout_blocks: of each pack that are measured, at most.
    """

    seconds: float = 150.0
    tokens: float = 1e12
    seed: int = 0
    sequences: int = 64
    learning_rate: float = 2e-3
    device: str = "cuda"
    experts: str = "grouped_mm"
    attention: str = "flex_attention"
    compiled: bool = True
    keep_every: float = 60.0
    heldout_blocks: int = 10_000


def attention_masks(options: Options, context: int, window: int) -> Any:
    """Transformers' masks for flex attention, made once instead of in every step; for others it makes its own."""
    if options.attention != "flex_attention":
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    def full(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return query >= key

    def sliding(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < window)

    rules = {"full_attention": full, "sliding_attention": sliding}
    return {name: create_block_mask(rule, None, None, context, context, device=options.device) for name, rule in rules.items()}


def weighted_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats: logits [b, t, vocabulary], targets [b, t], weights [b, t]."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def fresh_model(seed: int, experts: str, attention: str) -> Any:
    """The Transformers model that a training begins with, float32 on the CPU.

    Args:
        seed: of the weights; PyTorch's global generator is seeded with it.
        experts, attention: Transformers' implementations.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    described = GptOssConfig(**{key: value for key, value in config().items() if key not in ("architectures", "torch_dtype")})
    described._experts_implementation = experts
    described._attn_implementation = attention
    return GptOssForCausalLM(described).float()


class Run:
    """One training run and its folder."""

    def __init__(self, data: batches.Data, out: Path, options: Options) -> None:
        self.data, self.out, self.options = data, out, options
        on_gpu = options.device != "cpu"
        model = fresh_model(options.seed, options.experts, options.attention).to(options.device)
        self.masters = Masters(model, options.learning_rate, torch.bfloat16 if on_gpu else torch.float32)
        self.model = self.masters.model
        self.balance = Balance(self.model)
        self.masks = attention_masks(options, data.context, model.config.sliding_window)
        self.streams = [
            Stream(data.tokens[pack], data.spoken[pack], data.context, len(PACKS) * options.seed + i, options.device)
            for i, pack in enumerate(PACKS)
        ]
        self.loss = weighted_loss
        if options.compiled:
            self.loss = torch.compile(weighted_loss)
            for layer in self.model.model.layers:
                for part in (layer.mlp.experts, layer.input_layernorm, layer.post_attention_layernorm):
                    part.compile()
        self.steps, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.steps * self.options.sequences * self.data.context

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return max(self.seconds / self.options.seconds, self.tokens / self.options.tokens)

    def train(self) -> None:
        """Until time or tokens are used up, from the last state if there is one."""
        self._resume()
        self._warm_up()
        began, kept = time.monotonic() - self.seconds, time.monotonic()
        while self.progress < 1:
            loss, balance = self._step()
            self.seconds = time.monotonic() - began
            if self.steps % LOG_STEPS == 0:
                self._log(loss.item(), balance.item())
                if time.monotonic() - kept > self.options.keep_every and self.progress < 1:
                    self._keep()
                    began += time.monotonic() - began - self.seconds
                    kept = time.monotonic()
        if self.steps % LOG_STEPS:
            self._log(loss.item(), balance.item())
        self._keep()

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(input_ids=ids, attention_mask=self.masks, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(hidden)
        return logits

    def _losses(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        each = self.options.sequences // len(PACKS)
        taken = [stream.take(self.steps * each, each) for stream in self.streams]
        ids, spoken = (torch.cat(part) for part in zip(*taken, strict=True))
        logits = self._forward(ids[:, :-1])
        return self.loss(logits, ids[:, 1:], spoken[:, 1:] * (1 - UNSPOKEN) + UNSPOKEN), *self.balance.take()

    def _step(self) -> tuple[torch.Tensor, torch.Tensor]:
        progress = self.progress
        self.masters.refresh(progress >= MXFP4_FROM)
        loss, balance, counts = self._losses()
        torch.autograd.backward(loss + BALANCE * balance)
        rate = min((progress + 1e-3) / WARM_UP, (1 - progress) / (1 - WARM_UP), 1.0)
        self.masters.step(self.options.learning_rate * rate)
        for layer, count in enumerate(counts):
            bias = self.masters.weights[f"model.layers.{layer}.mlp.router.bias"]
            bias += BIAS_STEP * rate * (count.mean() - count).sign()
        self.steps += 1
        return loss.detach(), balance.detach()

    def _warm_up(self) -> None:
        """Compile before the clock runs: a step whose gradients are thrown away."""
        began = time.monotonic()
        self.masters.refresh(mxfp4=True)
        loss, balance, _ = self._losses()
        torch.autograd.backward(loss + BALANCE * balance)
        self.model.zero_grad(set_to_none=True)
        self.heldout(mxfp4=False, blocks=1)
        logger.info(f"warm after {time.monotonic() - began:.0f} s")

    @torch.no_grad()
    def heldout(self, mxfp4: bool, blocks: int | None = None) -> dict[str, Any]:
        """Perplexity of completion tokens by pack, and the smallest share of selections that an expert of a layer has."""
        self.masters.refresh(mxfp4)
        result, counts = {}, torch.zeros(1, device=self.options.device)
        for pack in PACKS:
            total, kept = 0.0, 0
            stop = min(len(self.data.heldout_ids[pack]), blocks or self.options.heldout_blocks)
            for start in range(0, stop, self.options.sequences):
                part = slice(start, min(stop, start + self.options.sequences))
                ids = torch.from_numpy(self.data.heldout_ids[pack][part].astype("int64")).to(self.options.device)
                keep = torch.from_numpy(self.data.heldout_keep[pack][part]).to(self.options.device)[:, 1:]
                log_p = self._forward(ids)[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
                total, kept = total - log_p[keep].double().sum().item(), kept + int(keep.sum())
                counts = counts + self.balance.take()[1]
            result[pack] = math.exp(total / kept)
        return {"perplexity": result, "smallest_share": (counts / counts.sum(-1, keepdim=True)).min().item()}

    def _log(self, loss: float, balance: float) -> None:
        if not math.isfinite(loss + balance):
            raise RuntimeError(f"step {self.steps}: loss {loss}, balance {balance}")
        point = {"step": self.steps, "tokens": self.tokens, "seconds": round(self.seconds, 2), "train_loss": loss, "balance": balance}
        self.curve.append(point)

    def _keep(self) -> None:
        found = self.heldout(self.progress >= MXFP4_FROM)
        last = self.curve[-1]
        last.update(heldout=found["perplexity"], smallest_share=found["smallest_share"])
        shown = ", ".join(f"{pack} {value:.2f}" for pack, value in found["perplexity"].items())
        logger.info(
            f"{self.seconds:.0f} s, step {self.steps}, {self.tokens / 1e6:.1f} M tokens, loss {last['train_loss']:.3f}, "
            f"balance {last['balance']:.3f}; held out: {shown}; smallest share {found['smallest_share']:.4f}"
        )
        state = self.out / "state"
        state.mkdir(parents=True, exist_ok=True)
        self.masters.save(state / f"{self.steps}.safetensors")
        at = {"steps": self.steps, "seconds": self.seconds, "options": asdict(self.options), "curve": self.curve}
        (state / "at.part").write_text(json.dumps(at))
        (state / "at.part").rename(state / "at.json")
        for old in state.glob("*.safetensors"):
            if old.stem != str(self.steps):
                old.unlink()

    def _resume(self) -> None:
        path = self.out / "state" / "at.json"
        if not path.exists():
            return
        at = json.loads(path.read_text())
        if at["options"] != asdict(self.options):
            raise InputError(str(path), "options", str(at["options"]), f"{asdict(self.options)}, or another folder")
        self.masters.load(path.with_name(f"{at['steps']}.safetensors"))
        self.steps, self.seconds, self.curve = at["steps"], at["seconds"], at["curve"]
        logger.info(f"going on from step {self.steps}")

    def finish(self, source: Path) -> None:
        """Measure the BF16 parent and the MXFP4 child, write both, and what the run was."""
        blocks = self.steps * self.options.sequences // len(PACKS)
        result = {
            "options": asdict(self.options), "steps": self.steps, "tokens": self.tokens, "seconds": round(self.seconds, 1),
            "tokens_per_second": round(self.tokens / self.seconds), "epochs": self.streams[0].epochs(blocks),
            "parent": self.heldout(mxfp4=False), "child": self.heldout(mxfp4=True),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "torch": torch.__version__,
            "data_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }  # fmt: skip
        weights = {name: weight.cpu() for name, weight in self.masters.weights.items()}
        for storage in ("bf16", "mxfp4"):
            shutil.rmtree(self.out / storage, ignore_errors=True)
            write(weights, self.out / storage, storage)
        (self.out / "curve.json").write_text(json.dumps(self.curve) + "\n")
        (self.out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
        logger.info(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    for name, value in asdict(Options()).items():
        if name != "compiled":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    args = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source, out = args.pop("data"), args.pop("out")
    run = Run(batches.load(source), out, Options(**args))
    run.train()
    run.finish(source)


if __name__ == "__main__":
    main()
