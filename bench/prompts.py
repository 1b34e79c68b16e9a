"""What a benchmark asks of a server, and how the server's answers count their tokens.

Nothing here touches the network or the clock.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from softprune.errors import InputError

Api = Literal["sglang", "openai"]
PATHS: dict[Api, str] = {"sglang": "/generate", "openai": "/v1/completions"}


@dataclass(frozen=True)
class Workload:
    """Requests of one fixed size.

    Attributes:
        prompt_tokens, max_new_tokens: length of every prompt and of every answer, in tokens.
        seed: with batch, repeat and stream it decides every prompt.
        token_ids: prompts are drawn from the ids `token_ids[0]` to `token_ids[1] - 1`.

    Raises:
        InputError: a length below 1, or no ids to draw from.
    """

    prompt_tokens: int
    max_new_tokens: int
    seed: int = 0
    token_ids: tuple[int, int] = (100, 1000)

    def __post_init__(self) -> None:
        for field in ("prompt_tokens", "max_new_tokens"):
            if getattr(self, field) < 1:
                raise InputError("workload", field, str(getattr(self, field)), "at least 1")
        first, end = self.token_ids
        if not 0 <= first < end:
            raise InputError("workload", "token_ids", f"{first} to {end}", "0 <= first < end")

    def prompt(self, batch: int, repeat: int, stream: int) -> list[int]:
        """Token ids of one prompt: other ones for every stream and repeat, the same ones in every process."""
        # A text seed is hashed with SHA-512, so neighbouring numbers give unrelated prompts.
        rng = random.Random(f"{self.seed}/{batch}/{repeat}/{stream}")
        return rng.choices(range(*self.token_ids), k=self.prompt_tokens)

    def body(self, api: Api, model: str | None, stream: bool, prompt: list[int]) -> bytes:
        """The request that forces an answer of max_new_tokens, as JSON."""
        length = self.max_new_tokens
        if api == "sglang":
            sampling = {"max_new_tokens": length, "ignore_eos": True, "temperature": 0}
            return json.dumps({"input_ids": prompt, "sampling_params": sampling, "stream": stream}).encode()
        request: dict[str, Any] = {"prompt": prompt, "max_tokens": length, "ignore_eos": True, "temperature": 0, "stream": stream}
        # A checkpoint's generation_config.json could otherwise add work to every step.
        request["repetition_penalty"] = 1.0
        if model is not None:
            request["model"] = model
        if stream:
            request["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return json.dumps(request).encode()


@dataclass(frozen=True)
class Counts:
    """A server's own cumulative token counts, from one answer or one chunk of it.

    Attributes:
        generated: tokens of the answer so far.
        prompt: tokens of the prompt; None in chunks that were only skimmed.
        cached: tokens of the prompt that a prefix cache held; None if the server does not say.
        finish: why the answer ended; None while it goes on.
    """

    generated: int
    prompt: int | None = None
    cached: int | None = None
    finish: str | None = None

    def then(self, later: Counts) -> Counts:
        """What is known after a later chunk: OpenAI's last one tells the usage, but no longer why the answer ended."""
        prompt = self.prompt if later.prompt is None else later.prompt
        cached = self.cached if later.cached is None else later.cached
        return Counts(later.generated, prompt, cached, later.finish or self.finish)


class ReportedError(ValueError):
    """The server put an error, or something that is no answer, where an answer belongs; the message is its text."""


_GENERATED = re.compile(rb'"completion_tokens":\s*(\d+)')


def counts_of_event(api: Api, event: bytes) -> Counts:
    """Counts of one server-sent event's JSON.

    Raises:
        ReportedError: it holds an error, or no counts.
    """
    # Chunks come by the ten thousand a second, and SGLang's repeat all ids so far. The bytes searched for cannot
    # stand inside a JSON string, where their quotes would be escaped.
    if b'"finish_reason":null' in event and (match := _GENERATED.search(event)):
        return Counts(int(match[1]))
    return counts_of_answer(api, event)


def counts_of_answer(api: Api, body: bytes) -> Counts:
    """Counts of a whole answer or of any chunk.

    Raises:
        ReportedError: it is an error, or holds no counts.
    """
    try:
        answer = json.loads(body)
    except ValueError:
        raise ReportedError(body.decode(errors="replace")) from None
    if not isinstance(answer, dict) or "error" in answer:
        raise ReportedError(_error_text(answer))
    if api == "sglang":
        usage = answer.get("meta_info") or {}
        reason = usage.get("finish_reason") or {}
        finish, cached = reason.get("type"), usage.get("cached_tokens")
    else:
        usage, choices = answer.get("usage") or {}, answer.get("choices") or [{}]
        reason, finish = {}, choices[0].get("finish_reason")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if finish in ("abort", "error"):
        raise ReportedError(f"{finish}: {reason.get('message', 'no message')}")
    if "completion_tokens" not in usage:
        raise ReportedError(f"no token counts in {json.dumps(answer)}")
    return Counts(usage["completion_tokens"], usage.get("prompt_tokens"), cached, finish)


def _error_text(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else answer
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


# What of SGLang's /server_info can change a decode figure; the rest is paths, ports, names and secrets.
_SGLANG_FLAGS = re.compile(
    r"(tp|dp|ep|pp|moe_dp)_size|(kv_cache_)?dtype|quantization|mem_fraction_static|context_length|page_size|load_format|device"
    r"|max_running_requests|max_total_tokens|max_total_num_tokens|max_req_input_len|chunked_prefill_size|max_prefill_tokens"
    r"|schedule_policy|num_continuous_decode_steps|stream_interval|incremental_streaming_output|skip_tokenizer_init"
    r"|((decode|prefill)_)?attention_backend|sampling_backend|moe_runner_backend|moe_a2a_backend|fp4_gemm_runner_backend"
    r"|cuda_graph_\w+|disable_\w+|enable_torch_compile|torch_compile_max_bs|enable_\w*fusion|enable_deterministic_inference"
    r"|speculative_(algorithm|num_steps|eagle_topk|num_draft_tokens)|cpu_offload_gb|random_seed"
)
_PATH = re.compile(r"[^\s'\"=(,]*/([^\s/'\",)]+)/?")


def pathless(value: Any) -> Any:
    """A copy in which every text that looks like a path, or holds one, keeps only the path's last component."""
    if isinstance(value, str):
        return _PATH.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {pathless(key): pathless(entry) for key, entry in value.items()}
    return [pathless(entry) for entry in value] if isinstance(value, list | tuple) else value


def sglang_flags(about: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and memory that may change a figure, of SGLang's /server_info; paths shortened."""
    flags = {name: pathless(value) for name, value in about.items() if _SGLANG_FLAGS.fullmatch(name) and value is not None}
    state: Mapping[str, Any] = next((one for one in about.get("internal_states") or [] if "memory_usage" in one), {})
    return flags | {name: state[name] for name in ("memory_usage", "effective_max_running_requests_per_dp") if name in state}
