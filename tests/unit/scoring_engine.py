"""An engine that scores prompts by a table: what comes after a token depends on that token and on the mask in force.

`ScoringEngine` answers as vLLM 0.32.0, vLLM 0.26.0 (whose call that takes ids is open) and SGLang 0.5.17 do, served alone or beneath
softprune's own control API (`fake_control`); its faults are those that an evaluation has to notice.
"""

from __future__ import annotations

import asyncio
import json
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.unit.fake_control import FakeControl, FakeEngine, ServedFake, _answer, make_launch

VOCABULARY = 4096
TOP = 20


@lru_cache(4096)
def table(previous: int, mask: str | None, weights: int = 0) -> NDArray[np.float64]:
    """Log-probabilities [VOCABULARY] of what follows a token."""
    seed = (int(mask[-8:], 16) if mask else 0) + weights
    logits = np.random.default_rng([previous, seed]).normal(scale=3, size=VOCABULARY)
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def expected(ids: NDArray[np.int32], mask: str | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log p and H of a block's tokens from the second on, straight from the definitions."""
    log_p, entropy = [], []
    for previous, token in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        row = table(previous, mask)
        top = np.exp(np.sort(row)[-TOP:])
        share = top / top.sum()
        log_p.append(row[token])
        entropy.append(-(share * np.log(share)).sum() / math.log(TOP))
    return np.array(log_p), np.array(entropy)


class ScoringEngine(FakeEngine):
    """See above.

    Attributes:
        fault: what goes wrong with scores, from request number `faulty` on.
        max_logprobs: as vLLM's flag.
        context: tokens, or None for a server that does not say.
        tokenizer: that /tokenize answers by; None for a server without one.
        refusal: what /tokenize answers without one: status and message.
        weights: number of the weights that it runs.
        delay: seconds that an answer takes.
        scored: ids that were asked about, in order of arrival.
    """

    def __init__(self, name: str = "vLLM 0.32.0", tokenizer: Any = None) -> None:
        super().__init__(name, launch=make_launch())
        self.fault, self.faulty = "", 0
        self.max_logprobs, self.context, self.tokenizer = TOP, 4096, tokenizer
        self.refusal, self.weights = (404, "Not Found"), 0
        self.delay = 0.0
        self.model = "/data/models/fake"
        self.scored: list[list[int]] = []
        self.names_epochs = False

    @property
    def takes_tokens(self) -> bool:
        """Whether it is a vLLM whose call that takes ids is open."""
        return self.name == "vLLM 0.26.0"

    @property
    def native(self) -> bool:
        """Whether it is SGLang."""
        return self.name.startswith("SGLang")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope["path"])
        body = b""
        while (message := await receive()).get("more_body") or message.get("body"):
            body += message["body"]
            if not message.get("more_body"):
                break
        version = self.name.split(" ")[1]
        about = {"/server_info": {"version": version, "model_path": self.model}} if self.native else {"/version": {"version": version}}
        card = {"id": "served-name", "root": self.model, "max_model_len": self.context}
        answers: dict[str, Any] = {**about, "/v1/models": {"object": "list", "data": [card]}}
        path = scope["path"]
        if path in answers:
            return await _answer(send, 200, json.dumps(answers[path]).encode())
        if path == "/tokenize":
            if self.tokenizer is None:
                status, said = self.refusal
                error = {"message": said, "type": "Error"}
                return await _answer(send, status, json.dumps({"object": "error", **error} if self.native else {"error": error}).encode())
            ids = self.tokenizer(json.loads(body)["prompt"], add_special_tokens=False)["input_ids"]
            return await _answer(send, 200, json.dumps({"tokens": ids, "count": len(ids), "max_model_len": 4096}).encode())
        if path == "/inference/v1/generate" and not self.native:
            if not self.takes_tokens:
                return await _answer(send, 403, b'{"error": {"message": "Scale-out endpoints are disabled."}}')
            return await self._scores_of_ids(json.loads(body), send)
        if path != ("/generate" if self.native else "/v1/completions"):
            return await _answer(send, 404, b'{"detail": "Not Found"}')
        return await self._scores(json.loads(body), send)

    async def _scores_of_ids(self, body: dict[str, Any], send: Any) -> None:
        if "token_ids" not in body:
            return await _answer(send, 400, b'{"error": {"message": "token_ids: Field required"}}')
        assert body["sampling_params"]["detokenize"] is False
        return await self._scores({"prompt": body["token_ids"], **body["sampling_params"]}, send)

    async def _scores(self, body: dict[str, Any], send: Any) -> None:
        ids = body["input_ids" if self.native else "prompt"]
        number = len(self.scored)
        self.scored.append(ids)
        await asyncio.sleep(self.delay)
        fault = self.fault if number >= self.faulty else ""
        if fault == "die":
            # A whole answer was promised; uvicorn closes the connection.
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
            return await send({"type": "http.response.body", "body": b"{", "more_body": True})
        asked = body["top_logprobs_num" if self.native else "prompt_logprobs"]
        if asked > self.max_logprobs or fault == "vocabulary":
            what = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
            what = "Token id 4095 is out of vocabulary" if fault == "vocabulary" else what
            return await _answer(send, 400, json.dumps({"error": {"message": what, "type": "BadRequestError"}}).encode())
        mask = self.ranks[0].routers.mask
        rows = [None if i == 0 else table(ids[i - 1], mask.hash if mask else None, self.weights) for i in range(len(ids))]
        answer = (self._sglang if self.native else self._vllm)(ids, rows, asked, fault)
        if self.names_epochs:
            (answer["meta_info"] if self.native else answer)["softprune"] = {"epochs": [len(self.epochs.masks) - 1]}
        return await _answer(send, 200, json.dumps(answer).encode())

    def _vllm(self, ids: list[int], rows: list[Any], asked: int, fault: str) -> dict[str, Any]:
        entries: list[Any] = [None]
        for token, row in zip(ids[1:], rows[1:], strict=True):
            best = np.argsort(-row)[: 7 if fault == "few" else asked]
            entry = {str(token): {"logprob": row[token], "rank": int((row >= row[token]).sum()), "decoded_token": "x"}}
            entry |= {str(one): {"logprob": row[one], "rank": rank + 1, "decoded_token": "x"} for rank, one in enumerate(best.tolist())}
            if fault in ("nan", "-inf"):
                entry[str(token)] = {**entry[str(token)], "logprob": math.nan if fault == "nan" else -9999.0}
            entries.append(entry)
        if fault == "others":
            entries[-1] = {"7": entries[-1][str(ids[-1])]}
        entries = entries[:-5] if fault == "truncated" else entries
        given = None if fault == "absent" else ["x"] * len(ids) if fault == "shape" else entries
        if self.takes_tokens:
            return {"request_id": "generate-tokens-1", "choices": [{"index": 0, "token_ids": [1]}], "prompt_logprobs": given}
        return {"id": "cmpl-1", "choices": [{"index": 0, "text": "", "logprobs": None, "prompt_logprobs": given}]}

    def _sglang(self, ids: list[int], rows: list[Any], asked: int, fault: str) -> dict[str, Any]:
        scored: list[Any] = [[None, ids[0], None]]
        tops: list[Any] = [None]
        for token, row in zip(ids[1:], rows[1:], strict=True):
            best = np.argsort(-row)[: 7 if fault == "few" else asked]
            scored.append([None if fault in ("nan", "-inf") else row[token], token, None])
            tops.append([[row[one], one, None] for one in best.tolist()])
        if fault == "others":
            scored[-1][1] = 7
        cut = -5 if fault == "truncated" else len(ids)
        meta: dict[str, Any] = {"id": "a1", "input_token_logprobs": scored[:cut], "input_top_logprobs": tops[:cut]}
        if fault == "absent":
            del meta["input_token_logprobs"]
        if fault == "shape":
            meta["input_token_logprobs"] = ["x"] * len(ids)
        return {"text": "", "meta_info": meta}


class Plain:
    """A server without softprune."""

    def __init__(self, engine: ScoringEngine) -> None:
        self.engine = engine

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.engine(scope, receive, send)


def served(engine: ScoringEngine, softprune: bool = True) -> ServedFake:
    """The engine on a port of its own, with softprune's control API or without."""
    engine.names_epochs = softprune
    return ServedFake(FakeControl(engine) if softprune else Plain(engine))  # type: ignore[arg-type]
