"""What is measured, as data: rows in order of importance, with the seconds that each is thought to take.

Estimates follow from tokens per second: measured on H100 and H200 up to batch 64 (docs/proof.md), and guessed beyond; a run corrects them
by what its own rows took. A phase is a set of servers that share the GPU: three at once with little KV, two with room for long answers of
large batches, so that 80 GB are enough. Each phase has its own unmasked rows, so that every ratio is of servers that ran side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PROMPT_TOKENS = 256
TOK_S: Mapping[str, Mapping[int, float]] = {
    "sglang": {1: 280, 8: 1_450, 32: 4_200, 64: 7_000, 128: 10_500, 256: 14_000},
    "vllm": {1: 330, 8: 1_650, 32: 4_600, 64: 8_200, 128: 13_000},
    "tiny": {2: 30, 4: 50},
}


@dataclass(frozen=True)
class Served:
    """A server of a phase.

    Attributes:
        name: of the server.
        keep: experts that its checkpoint was rewritten to; None for the whole one.
        top_k: experts per token, if not the model's own.
        mask: experts that the mask keeps which it starts with; None for no mask.
        is_patched: whether softprune is in it; a rewritten checkpoint needs nothing but the engine.
    """

    name: str
    keep: int | None = None
    top_k: int | None = None
    mask: int | None = None
    is_patched: bool = True

    @property
    def model(self) -> str:
        """The checkpoint's folder."""
        return "base" if self.keep is None else f"rewritten{self.keep}"

    @property
    def mask_file(self) -> str:
        """Name of the file of the mask that it starts with, if it does."""
        return f"keep{self.mask}.json"


BASE, TOP2, PLAIN = Served("base"), Served("top2", top_k=2), Served("plain", is_patched=False)
REWRITTEN = {keep: Served(f"rewritten{keep}", keep, is_patched=False) for keep in (24, 16)}
STARTED = {keep: Served(f"started{keep}", mask=keep) for keep in (24, 16)}


@dataclass(frozen=True)
class Variant:
    """What a row measures: a server, and the experts that its mask keeps (None for no mask), switched live unless it started with it."""

    server: Served
    keep: int | None = None


VARIANTS: Mapping[str, Variant] = {
    "unmasked": Variant(BASE),
    "keep24": Variant(BASE, 24),
    "keep24_rewritten": Variant(REWRITTEN[24]),
    "keep16": Variant(BASE, 16),
    "keep16_rewritten": Variant(REWRITTEN[16]),
    "top2": Variant(TOP2),
    "keep24_top2": Variant(TOP2, 24),
    **{f"keep{keep}_started": Variant(server, keep) for keep, server in STARTED.items()},
}


@dataclass(frozen=True)
class Row:
    """One pass.

    Attributes:
        variant: of `VARIANTS`.
        batch, prompt_tokens, max_new_tokens: what is sent.
        repeat: number of the row among those that differ in nothing else.
        round: rows of one round are measured right after each other, and compared.
        seconds: estimate.
    """

    variant: str
    batch: int
    prompt_tokens: int
    max_new_tokens: int
    repeat: int
    round: str
    seconds: float

    @property
    def name(self) -> str:
        """Of its raw file."""
        return f"{self.variant}.bs{self.batch}.new{self.max_new_tokens}.r{self.repeat}"

    @property
    def kv_tokens(self) -> int:
        """What all its requests hold at their end."""
        return self.batch * (self.prompt_tokens + self.max_new_tokens)


@dataclass(frozen=True)
class Phase:
    """Servers that share the GPU, and what is measured on them.

    Attributes:
        kv_tokens: KV room of each.
        max_batch: largest batch for which they capture graphs.
        boot_s: estimate until all are up, when booted side by side.
    """

    name: str
    kv_tokens: int
    max_batch: int
    boot_s: float
    rows: tuple[Row, ...]

    @property
    def servers(self) -> tuple[Served, ...]:
        return tuple(dict.fromkeys(VARIANTS[row.variant].server for row in self.rows))


def rounds(
    engine: str, phase: str, variants: Sequence[str], batch: int, new: int, first: Mapping[str, int] | None = None, repeats: int = 1,
    prompt_tokens: int = PROMPT_TOKENS,
) -> tuple[Row, ...]:  # fmt: skip
    """Rows of every variant in turn, forwards and backwards: A B, B A, A B, so that what drifts hits all alike.

    Args:
        first: number of a variant's first repeat, where an earlier phase had some; 1 for the others.
    """
    rate = TOK_S[engine][batch] * (0.9 if new > 4096 else 1.0)
    found = []
    for number in range(repeats):
        for variant in variants if number % 2 == 0 else reversed(variants):
            repeat = (first or {}).get(variant, 1) + number
            found.append(Row(variant, batch, prompt_tokens, new, repeat, f"{phase} {number + 1}", batch * new / rate + 1.5))
    return tuple(found)


def sglang() -> tuple[Phase, ...]:
    """The matrix in SGLang: about 25 minutes."""
    rewritten = ("unmasked", "keep24", "keep24_rewritten", "keep16", "keep16_rewritten")
    few = rounds("sglang", "few", rewritten, 32, 2048, repeats=3)
    for batch in (8, 1, 64):
        few += rounds("sglang", "few", rewritten, batch, 512)
    with_top_k = ("unmasked", "top2", "keep24_top2")
    top_k = rounds("sglang", "top_k", with_top_k, 32, 2048, {"unmasked": 4}, repeats=3)
    top_k += rounds("sglang", "top_k", ("unmasked", "keep16", "top2"), 32, 8192)
    top_k += rounds("sglang", "top_k", with_top_k, 128, 2048, {"unmasked": 3})
    for batch in (8, 1, 64):
        top_k += rounds("sglang", "top_k", with_top_k, batch, 512, {"unmasked": 2})
    top_k += rounds("sglang", "top_k", with_top_k, 256, 512, {"unmasked": 3})
    return (
        Phase("few", 80_000, 64, 110, few),
        _large(24, 1),
        _large(16, 2),
        Phase("top_k", 300_000, 256, 100, top_k),
    )


def _large(keep: int, unmasked: int) -> Phase:
    """Batches that leave room for two servers only; `unmasked` is the number of its repeat there."""
    name, variants = f"large {keep}", ("unmasked", f"keep{keep}", f"keep{keep}_rewritten")
    sizes = ((128, 2048), (256, 512))
    return Phase(
        name, 300_000, 256, 90,
        tuple(row for batch, new in sizes for row in rounds("sglang", name, variants, batch, new, {"unmasked": unmasked})),
    )  # fmt: skip


def vllm() -> tuple[Phase, ...]:
    """The smaller matrix in vLLM: about 11 minutes."""
    few = rounds("vllm", "few", ("unmasked", "keep24", "keep24_rewritten", "top2"), 32, 2048, repeats=3)
    rewritten = rounds("vllm", "large 24", ("unmasked", "keep24", "keep24_rewritten"), 128, 2048)
    top2 = rounds("vllm", "large top_k", ("unmasked", "top2"), 128, 2048, {"unmasked": 2})
    return (
        Phase("few", 80_000, 32, 160, few),
        Phase("large 24", 300_000, 128, 130, rewritten),
        Phase("large top_k", 300_000, 128, 130, top2),
    )


def sglang_started() -> tuple[Phase, ...]:
    """Servers that start with their mask, for which kernels choose their tiles, beside rewritten and live ones: about 20 minutes."""
    sizes = ((64, 2048), (128, 2048))
    pairs = (("keep16_started", "keep16_rewritten"), ("keep24_started", "keep24_rewritten"), ("keep16_started", "keep16"))
    return tuple(_started("sglang", *pair, sizes) for pair in pairs)


def vllm_started() -> tuple[Phase, ...]:
    """The same in vLLM: about 15 minutes."""
    pairs = (("keep24_started", "keep24_rewritten"), ("keep24_started", "keep24"), ("keep16_started", "keep16_rewritten"))
    return tuple(_started("vllm", *pair, ((128, 2048),)) for pair in pairs)


def _started(engine: str, variant: str, other: str, sizes: Sequence[tuple[int, int]]) -> Phase:
    """A server that starts with a mask beside another, at batches where their tiles differ or differed, thrice each."""
    name = f"started: {variant}, {other}"
    # Repeats of their own, so that rows are others than the matrix has, and than another pair of the variant.
    first = dict.fromkeys((variant, other), 21 if VARIANTS[other].server is BASE else 11)
    rows = (row for batch, new in sizes for row in rounds(engine, name, (variant, other), batch, new, first, repeats=3))
    return Phase(name, 300_000, 128, {"sglang": 120, "vllm": 160}[engine], tuple(rows))


def tiny() -> tuple[Phase, ...]:
    """A small one for the small model on a CPU, to try the scripts."""
    few = rounds("tiny", "few", ("unmasked", "keep24", "keep24_rewritten"), 2, 96, repeats=3, prompt_tokens=32)
    top_k = rounds("tiny", "top_k", ("top2", "keep24_top2"), 4, 16, prompt_tokens=32)
    started = rounds("tiny", "started 24", ("keep24_started", "keep24_rewritten"), 4, 16, prompt_tokens=32)
    return Phase("few", 4_096, 8, 60, few), Phase("top_k", 4_096, 8, 45, top_k), Phase("started 24", 4_096, 8, 60, started)


PLANS: Mapping[str, Callable[[], tuple[Phase, ...]]] = {
    "sglang": sglang, "vllm": vllm, "sglang_started": sglang_started, "vllm_started": vllm_started, "tiny": tiny,
}  # fmt: skip
