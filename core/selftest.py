"""Proving on a running server, with its own model and device, that a mask is obeyed and leaves no trace."""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

from softprune.bench.client import DecodeClient
from softprune.bench.prompts import PATHS, Api, Workload
from softprune.checkpoint.families import ModelSpec
from softprune.errors import InputError, SoftpruneError
from softprune.mask import ExpertMask
from softprune.mask_forms import build
from softprune.server_client import ServerCallError, ServerClient
from softprune.signals import ended_in_order, run_async, uninterrupted

PROMPTS = 4
"""Prompts whose log-probabilities are compared."""
PROMPT_TOKENS = 64
ANSWER_TOKENS = 16
SLACK = 1e-6
"""What a log-probability may differ by, beyond what two identical askings differ by."""


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        passed: None where it says a figure only, or could not be looked at.
        detail: what was found.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Scores:
    """One prompt's log-probabilities, greedily continued.

    Attributes:
        prompt: of each prompt token but the first.
        answer: (token, log-probability) of each answer token.
    """

    prompt: list[float]
    answer: list[tuple[str, float]]

    def gap(self, other: Scores) -> float:
        """The largest difference, up to the first answer token that differs; after it the contexts differ as well."""
        gaps = [_gap(a, b) for a, b in zip(self.prompt, other.prompt, strict=True)]
        for (token, a), (other_token, b) in zip(self.answer, other.answer, strict=True):
            gaps.append(_gap(a, b))
            if token != other_token:
                break
        return max(gaps)


class SelfTest:
    """One self-test of one server. Masks are switched live, so nobody else should be using it.

    Args:
        client: the server's.
        mask: to test with; None for `half_mask`.
        batch, tokens: requests at once and length of their answers, for the speed.
        seed: of prompts and of `half_mask`.
        token_ids: prompts are drawn from the ids `token_ids[0]` to `token_ids[1] - 1`.

    Attributes:
        checks: what was found so far.
    """

    def __init__(
        self, client: ServerClient, mask: ExpertMask | None = None, batch: int = 8, tokens: int = 64, seed: int = 0,
        token_ids: tuple[int, int] = (100, 1000),
    ) -> None:  # fmt: skip
        self.client, self.batch, self.seed = client, batch, seed
        self.scored = Workload(PROMPT_TOKENS, ANSWER_TOKENS, seed, token_ids)
        self.timed = Workload(PROMPT_TOKENS, tokens, seed, token_ids)
        self.checks: list[Check] = []
        self._given = mask
        self._show: Callable[[Check], None] = lambda _: None

    def run(self, show: Callable[[Check], None] = lambda _: None) -> bool:
        """Look at everything, and put the mask that was in force back, whatever happens, SIGTERM and SIGHUP as well.

        Args:
            show: called with each finding as it is made.

        Returns:
            Whether no check failed.

        Raises:
            SoftpruneError: the server cannot be asked, or the mask prunes nothing; no mask was switched.
        """
        self._show = show
        status, before = self.client.status(), self.client.mask()
        mask = self._given or half_mask(status, self.seed)
        if not any(map(mask.pruned, range(mask.model.num_layers))):
            raise InputError("--mask", "", "a mask that prunes nothing", "one that does")
        api: Api = "sglang" if str(status.get("engine")).startswith("SGLang") else "openai"
        with ended_in_order():
            try:
                self._scores_and_routes(api, mask, int(status["top_k"]))
                self._speed(api, mask)
            except SoftpruneError as error:
                self._found("completed", False, f"stopped: {error}")
            finally:
                with uninterrupted():
                    self._restore(before)
        return all(check.passed is not False for check in self.checks)

    def _found(self, name: str, passed: bool | None, detail: str) -> None:
        self.checks.append(Check(name, passed, detail))
        self._show(self.checks[-1])

    def _scores_and_routes(self, api: Api, mask: ExpertMask, top_k: int) -> None:
        self.client.delete_mask()
        first, again = self._ask(api), self._ask(api)
        self.client.put_mask(mask)
        verdict = self.client.verify()
        detail = (
            f"{mask.summary}; each router run once: pruned experts' logits are -inf, no others" if verdict["obeyed"] else verdict["detail"]
        )
        self._found("routers obey", verdict["obeyed"], detail)
        has_probe = self._has_probe()
        masked = self._ask(api)
        if has_probe:
            self._found("real traffic obeys", *_counted(self.client.routes(), mask, top_k, self._num_tokens()))
        else:
            self._found("real traffic obeys", None, "not counted: for that, the server has to run with --softprune-debug-routes")
        self.client.delete_mask()
        restored = self._ask(api)
        noise, changed, trace = (max(a.gap(b) for a, b in zip(first, other, strict=True)) for other in (again, masked, restored))
        values = sum(len(one.prompt) + len(one.answer) for one in first)
        noise_text = f"two identical askings differ by up to {noise:.3g}"
        self._found("mask changes answers", changed > noise + SLACK, f"log-probabilities by up to {changed:.3g}; {noise_text}")
        self._found(
            "mask leaves no trace", trace <= noise + SLACK,
            f"{values} log-probabilities without it, before and after, differ by up to {trace:.3g}; {noise_text}",
        )  # fmt: skip

    def _has_probe(self) -> bool:
        """Set the counters of the route probe to zero, if there is one."""
        try:
            self.client.routes(reset=True)
        except ServerCallError as error:
            if error.kind == "probe_is_off":
                return False
            raise
        return True

    def _num_tokens(self) -> int:
        """Tokens that pass each router when the prompts are asked once; an answer's last one is never run."""
        return PROMPTS * (PROMPT_TOKENS + ANSWER_TOKENS - 1)

    def _ask(self, api: Api) -> list[Scores]:
        """Each prompt alone, so that batches add no noise, with its log-probabilities, which no engine takes from a prefix cache."""
        prompts = [self.scored.prompt(PROMPTS, 1, index) for index in range(PROMPTS)]
        # A salt of its own all the same: an asking that was answered from a cache would prove nothing.
        salt = f"selftest-{secrets.token_hex(8)}"
        answers = [self.client.post(PATHS[api], _body(api, prompt, salt)) for prompt in prompts]
        try:
            return [_scores(api, answer, prompt) for answer, prompt in zip(answers, prompts, strict=True)]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ServerCallError(self.client.url, 200, "", f"no log-probabilities in its answer ({error!r})") from None

    def _speed(self, api: Api, mask: ExpertMask) -> None:
        """Passes without and with the mask, A B B A, after one of each that does not count."""
        speeds: dict[bool, list[float]] = {False: [], True: []}

        async def run() -> None:
            async with DecodeClient(self.client.url, self.timed, api, key=self.client.key, engine_key=self.client.engine_key) as server:
                for number, masked in enumerate((False, True, False, True, True, False), start=-1):
                    self.client.switch(mask if masked else None)  # nothing else runs in this loop
                    result = await server.run_batch(self.batch, number)
                    if number > 0:
                        speeds[masked].append(result.total_tok_s)

        run_async(run())
        plain, masked = mean(speeds[False]), mean(speeds[True])
        passes = " and ".join(f"{a:,.0f} to {b:,.0f}" for a, b in ((min(one), max(one)) for one in (speeds[True], speeds[False])))
        self._found("speed", None, f"{masked / plain:.2f}× with the mask at batch {self.batch} ({passes} tok/s with and without)")

    def _restore(self, before: ExpertMask | None) -> None:
        what = "no mask" if before is None else f"mask {before.hash[:19]}…"
        # Not as patient as the client that was given: Ctrl-C does not end this.
        client = ServerClient(self.client.url, self.client.key, timeout=20, switch_timeout=20, engine_key=self.client.engine_key)
        for attempt in range(3):
            time.sleep(attempt)
            try:
                epoch = client.switch(before)["epoch"]
                now = client.mask()
            except ServerCallError as error:
                problem = str(error)
                continue
            if (now and now.hash) == (before and before.hash):
                self._found("put back", True, f"{what}, in force before the test, is in force again (epoch {epoch})")
                return
            problem = f"{self.client.url}: another mask is in force"
        self._found("put back", False, f"{what.upper()}, IN FORCE BEFORE THE TEST, WAS NOT PUT BACK: {problem}")


def half_mask(status: dict[str, Any], seed: int) -> ExpertMask:
    """A mask that keeps half of the experts of each layer, at random, and never fewer than the model's top_k.

    Args:
        status: of the server that serves the model.
        seed: same seed, same mask.

    Raises:
        InputError: such a mask would prune nothing.
    """
    shape = ModelSpec(status["architecture"], tuple(range(status["num_layers"])), status["num_experts"], status["model_top_k"])
    number = max(shape.num_experts // 2, shape.top_k)
    if number >= shape.num_experts:
        raise InputError("selftest", "", f"a router that chooses {shape.top_k} of {shape.num_experts} experts", "one with experts to spare")
    rng = random.Random(seed)
    keep = [rng.sample(range(shape.num_experts), number) for _ in shape.moe_layers]
    return build(shape, keep, status["fingerprint"], {"method": "selftest", "seed": seed}, "selftest")


def _counted(routes: dict[str, Any], mask: ExpertMask, top_k: int, least: int) -> tuple[bool, str]:
    """Whether what the routers selected under a mask obeys it, and what they selected.

    Args:
        routes: the route probe's counters, from zero.
        mask: in force all the while.
        top_k: experts that the server selects for each token.
        least: tokens that each router saw at least.
    """
    for layer, (tokens, counts) in enumerate(zip(routes["tokens"], routes["counts"], strict=True)):
        pruned = [expert for expert in mask.pruned(layer) if counts[expert]]
        if pruned:
            return False, f"layer {layer}: pruned expert {pruned[0]} was selected {counts[pruned[0]]} times in {tokens} tokens"
        if sum(counts) != tokens * top_k or tokens < least:
            return (
                False,
                f"layer {layer}: {sum(counts)} selections counted in {tokens} tokens; expected {top_k} each, in {least} tokens or more",
            )
    total = sum(map(sum, routes["counts"]))
    return True, f"{total:,} selections in {len(routes['tokens'])} layers counted, all accounted for: none of a pruned expert"


def _body(api: Api, prompt: list[int], salt: str) -> dict[str, Any]:
    if api == "sglang":
        sampling = {"max_new_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0}
        return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0, "extra_key": salt}
    return {
        "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0, "repetition_penalty": 1.0, "logprobs": 0,
        "prompt_logprobs": 0, "return_tokens_as_token_ids": True, "cache_salt": salt,
    }  # fmt: skip


def _scores(api: Api, answer: Any, prompt: list[int]) -> Scores:
    if api == "sglang":
        meta = answer["meta_info"]
        before = [float(entry[0]) for entry in meta["input_token_logprobs"][1:]]
        after = [(str(entry[1]), float(entry[0])) for entry in meta["output_token_logprobs"]]
    else:
        choice = answer["choices"][0]
        scored = zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)
        before = [float(entry[str(token)]["logprob"]) for entry, token in scored]
        logprobs = choice["logprobs"]
        after = [(str(token), float(value)) for token, value in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)]
    if (len(before), len(after)) != (PROMPT_TOKENS - 1, ANSWER_TOKENS):
        raise ValueError(f"{len(before)} of the prompt, {len(after)} of the answer")
    return Scores(before, after)


def _gap(a: float, b: float) -> float:
    """NaN is as far as can be from everything, itself as well."""
    if a == b:
        return 0.0
    return math.inf if math.isnan(a - b) else abs(a - b)
