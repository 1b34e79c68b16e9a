"""Teacher-forced requests to a running server: a block's ids as a prompt, with the log-probability of every one of them asked for.

Engines compute all tokens of such a prompt, also those that their prefix cache knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softprune.errors import shortened
from softprune.runtime.tags import SPANS_KEY, TAG_KEY
from softprune.server_client import ServerCallError, ServerClient


def spans_text(spans: Sequence[tuple[int, int]]) -> str:
    """Ranges [start, stop) of token positions as a request carries them, e.g. "12-40,55-90"; "" for none at all.

    One text, since vLLM passes on nothing but texts, numbers and lists of them.
    """
    return ",".join(f"{start}-{stop}" for start, stop in spans)


@dataclass(frozen=True)
class Replay:
    """Sends blocks to one server.

    Attributes:
        client: of the server.
        model: the name that vLLM serves it under; None for SGLang.
    """

    client: ServerClient
    model: str | None

    @classmethod
    def of(cls, client: ServerClient, engine: str) -> Replay:
        """Ask a server what it needs to be told.

        Args:
            client: of the server.
            engine: its name and version, as in `client.status()`.

        Raises:
            ServerCallError: it does not answer.
        """
        if not engine.startswith("vLLM "):
            return cls(client, None)
        answer = client.get("/v1/models")
        try:
            return cls(client, str(answer["data"][0]["id"]))
        except (KeyError, TypeError, IndexError):
            raise ServerCallError(client.url, 200, "", f"/v1/models: found {shortened(answer)}; expected a model") from None

    def send(self, ids: Sequence[int], tag: str, spans: Sequence[tuple[int, int]] | None = None) -> None:
        """Have the server compute a block.

        Args:
            ids: token ids, all of which are the prompt.
            tag: that it is counted under.
            spans: ranges of its completion tokens, where the server has to know them.

        Raises:
            ServerCallError: it is refused, or what is answered is not about these tokens.
        """
        parameters = {TAG_KEY: tag} if spans is None else {TAG_KEY: tag, SPANS_KEY: spans_text(spans)}
        path, body = self._sglang(list(ids), parameters) if self.model is None else self._vllm(list(ids), parameters)
        answer = self.client.post(path, body)
        try:
            scored = _scored_by_sglang(answer) if self.model is None else _scored_by_vllm(answer, ids)
        except (KeyError, TypeError, IndexError, ValueError):
            raise ServerCallError(self.client.url, 200, "", f"found {shortened(answer)}; expected log-probabilities of a prompt") from None
        if scored != list(ids):
            found = f"log-probabilities of {len(scored)} other tokens"
            raise ServerCallError(self.client.url, 200, "", f"found {found}; expected those of the {len(ids)} that were sent")

    def _sglang(self, ids: list[int], parameters: dict[str, str]) -> tuple[str, dict[str, Any]]:
        sampling = {"max_new_tokens": 0, "temperature": 0, "custom_params": parameters}
        return "/generate", {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}

    def _vllm(self, ids: list[int], parameters: dict[str, str]) -> tuple[str, dict[str, Any]]:
        # vLLM generates at least one token, whose own pass through the model never comes.
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        return "/v1/completions", {**body, "vllm_xargs": parameters}


def _scored_by_sglang(answer: Any) -> list[int]:
    """Ids of the tokens that an answer has log-probabilities of; the first has none, since nothing predicts it."""
    return [int(token) for _, token, *_ in answer["meta_info"]["input_token_logprobs"]]


def _scored_by_vllm(answer: Any, ids: Sequence[int]) -> list[int]:
    first, *others = answer["choices"][0]["prompt_logprobs"]
    if first is not None or len(others) != len(ids) - 1:
        return [0] * (len(others) + 1)
    return [ids[0], *(token if str(token) in entry else -1 for token, entry in zip(ids[1:], others, strict=True))]
