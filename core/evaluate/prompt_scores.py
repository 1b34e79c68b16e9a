"""Teacher-forced scores from a running server: a block's ids as a prompt, with the log-probabilities of its tokens asked for.

vLLM answers for each token a mapping of the likeliest ids, and the token itself beside them if it is not among them; SGLang answers the
tokens and the likeliest ids apart. Neither needs softprune for it. Nothing is skipped: a token that counts and cannot be scored is an
error, since leaving it out would make a worse model look better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.errors import SoftpruneError, shortened
from softprune.evaluate.errors import EvaluationError
from softprune.evaluate.served import TOKENS_CALL, Served
from softprune.server_client import ServerCallError, ServerClient

_IMPOSSIBLE = -9999.0
"""What vLLM writes for a log-probability of minus infinity, which JSON has not."""


@dataclass(frozen=True)
class TokenScores:
    """Of a block's completion tokens, in order.

    Attributes:
        log_p: float32 [n], natural log-probability of the token.
        entropy: float32 [n], of the likeliest tokens, renormalised to 1, over ln of their number, within [0, 1] (spec/metrics.md 1.4).
    """

    log_p: NDArray[np.float32]
    entropy: NDArray[np.float32]


NO_SCORES = TokenScores(np.empty(0, np.float32), np.empty(0, np.float32))
"""Of a block in which no token counts."""


@dataclass(frozen=True)
class PromptScorer:
    """Asks one server.

    Attributes:
        client, served: the server.
        top: likeliest tokens that the entropy is of, at least 2.
    """

    client: ServerClient
    served: Served
    top: int = 20

    def score(self, ids: NDArray[np.int32], keep: NDArray[np.bool_]) -> TokenScores:
        """Scores of one block.

        Args:
            ids: int32 [n], of which all are sent.
            keep: bool [n], the tokens that count; not the first, which nothing predicts.

        Raises:
            ServerCallError: no answer, or a refusal.
            EvaluationError: an answer that is not about these tokens, lacks something, or came under another mask than at the start.
        """
        sent = ids.tolist()
        path, body = request_of(self.served, sent, self.top)
        try:
            answer = self.client.post(path, body)
        except ServerCallError as error:
            raise self._explained(error) from None
        self._check_epochs(answer)
        read = _from_vllm if self.served.engine == "vllm" else _from_sglang
        wrong = _complaints(self.client.url)
        log_p, lists = read(answer, sent, np.flatnonzero(keep).tolist(), wrong)
        for values, what in ((log_p, "log-probability"), (np.concatenate([*lists, np.zeros(1)]), "log-probability among the likeliest")):
            if not np.isfinite(values).all():
                raise wrong(f"{int((~np.isfinite(values)).sum())} tokens that count without a finite {what}", "a number for each")
        for values in lists:
            if len(values) < self.top:
                raise wrong(f"the {len(values)} likeliest tokens", f"{self.top}, as were asked for")
        return TokenScores(np.asarray(log_p, np.float32), top_entropy([np.sort(values)[::-1][: self.top] for values in lists], self.top))

    def _check_epochs(self, answer: Any) -> None:
        """Refuse an answer that was computed under another mask than the one in force at the start, where softprune says so.

        Raises:
            EvaluationError: so.
        """
        if self.served.epoch is None:
            return
        try:
            said = answer if self.served.engine == "vllm" else answer["meta_info"]
            epochs = said["softprune"]["epochs"]
        except (KeyError, TypeError):
            epochs = None
        if epochs != [self.served.epoch]:
            expected = f"epoch {self.served.epoch}, as at the start: the mask was switched in the middle of it"
            raise _complaints(self.client.url)(f"an answer under mask epochs {shortened(epochs)}", expected)

    def _explained(self, error: ServerCallError) -> SoftpruneError:
        """A refusal, with what can be done about it."""
        text = error.message.lower()
        if error.status is None or not 400 <= error.status < 500:
            return error
        if "logprobs" in text and "max allowed" in text:
            hint = f"{self.top} likeliest tokens are needed: start the server with --max-logprobs {self.top} or more"
        elif "vocab" in text:
            hint = "the packs' tokenizer has ids that the model has not"
        else:
            return error
        # SGLang lists every id.
        said = error.message if len(error.message) < 200 else f"{error.message[:80]} … {error.message[-80:]}"
        return ServerCallError(error.url, error.status, error.kind, f"{said} ({hint})", error.detail)


def request_of(served: Served, ids: Sequence[int], top: int) -> tuple[str, dict[str, Any]]:
    """Path and body of the call that scores a block."""
    if served.engine == "sglang":
        more = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": top}
        return "/generate", {"input_ids": list(ids), "sampling_params": {"max_new_tokens": 0, "temperature": 0}, **more}
    # vLLM generates at least one token.
    sampling = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
    if served.takes_tokens:
        # Without a text for each of the likeliest tokens, which is two thirds of what vLLM's front end does for them.
        return TOKENS_CALL, {"model": served.model, "token_ids": list(ids), "sampling_params": {**sampling, "detokenize": False}}
    return "/v1/completions", {"model": served.model, "prompt": list(ids), **sampling}


def top_entropy(lists: Sequence[NDArray[np.float64]], top: int) -> NDArray[np.float32]:
    """Entropy of the likeliest tokens alone, renormalised to 1, over ln `top` (spec/metrics.md 1.4).

    Args:
        lists: natural log-probabilities, `top` of each token.
        top: at least 2.
    """
    values = np.asarray(lists, np.float64).reshape(-1, top)
    shares = np.exp(values - values.max(-1, initial=-np.inf, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    entropy = -(shares * np.log(np.clip(shares, 1e-12, 1))).sum(-1) / math.log(top)
    return np.asarray(np.clip(entropy, 0, 1), np.float32)


_Wrong = Callable[[str, str], EvaluationError]
_Read = tuple[NDArray[np.float64], list[NDArray[np.float64]]]


def _complaints(url: str) -> _Wrong:
    return lambda found, expected: EvaluationError(f"{url}: found {found}; expected {expected}")


def _from_vllm(answer: Any, ids: list[int], places: list[int], wrong: _Wrong) -> _Read:
    """Log-probabilities of the tokens at some places of the block, and of the likeliest there."""
    try:
        entries = (answer if "prompt_logprobs" in answer else answer["choices"][0])["prompt_logprobs"]
    except (KeyError, TypeError, IndexError):
        entries = None
    _check_entries(entries, ids, wrong)
    found, lists = [], []
    try:
        for place in range(1, len(ids)):
            own = entries[place].get(str(ids[place]))
            if own is None:
                raise wrong(f"token {place} scored as another one ({shortened(entries[place])})", f"token {ids[place]}, as was sent")
            found.append(_number(own["logprob"]))
        lists = [np.array([_number(one["logprob"]) for one in entries[place].values()]) for place in places]
    except (AttributeError, KeyError, TypeError):
        raise wrong("log-probabilities in another form", "those of vLLM") from None
    return np.array([np.nan, *found])[places], lists


def _from_sglang(answer: Any, ids: list[int], places: list[int], wrong: _Wrong) -> _Read:
    """As `_from_vllm`."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    entries, tops = (meta.get(name) if isinstance(meta, dict) else None for name in ("input_token_logprobs", "input_top_logprobs"))
    _check_entries(entries, ids, wrong)
    _check_entries(tops, ids, wrong, "lists of likeliest tokens")
    assert entries is not None
    assert tops is not None
    try:
        scored = [int(entry[1]) for entry in entries]
        if scored != ids:
            place = next(i for i, (a, b) in enumerate(zip(scored, ids, strict=True)) if a != b)
            raise wrong(f"token {place} scored as {scored[place]}", f"token {ids[place]}, as was sent")
        found = np.array([_number(entry[0]) for entry in entries])
        lists = [np.array([_number(one[0]) for one in tops[place] or ()]) for place in places]
    except (TypeError, IndexError, ValueError):
        raise wrong("log-probabilities in another form", "those of SGLang's generate") from None
    return found[places], lists


def _check_entries(entries: Any, ids: list[int], wrong: _Wrong, what: str = "log-probabilities of the prompt's tokens") -> None:
    if not isinstance(entries, list):
        raise wrong(f"no {what}", f"{len(ids)}: the server leaves them out")
    if len(entries) != len(ids):
        raise wrong(f"{len(entries)} {what}", f"{len(ids)}: they are truncated")


def _number(value: Any) -> float:
    """NaN for what is no number, or stands for none; -inf for what vLLM writes for that."""
    if value is None or isinstance(value, str | bool):
        return math.nan
    return -math.inf if value == _IMPOSSIBLE else float(value)
