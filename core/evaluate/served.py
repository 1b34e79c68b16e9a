"""What a running server serves, as far as its own API and softprune's say, and whether it is what packs were made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from softprune.checkpoint.families import read_config
from softprune.errors import InputError, shortened
from softprune.server_client import ServerCallError, ServerClient

Engine = Literal["vllm", "sglang"]
TOKENS_CALL: Final = "/inference/v1/generate"
_COMPUTES = ("dtype", "quantization", "kv_cache_dtype", "revision", "weight_version", "device")
"""What SGLang's /server_info says of it; vLLM says nothing."""


@dataclass(frozen=True)
class Served:
    """A server, at one moment.

    Attributes:
        engine, version: e.g. "vllm", "0.32.0".
        model: the name under which it is served.
        path: the checkpoint, as the server was given it.
        tokenizer: likewise.
        context: tokens of a prompt and its answer, at most; None if the server does not say.
        status: softprune's, as `ServerClient.status` has it; None for a server without softprune.
        computes: what the model is and how it is computed, as far as the server says.
        takes_tokens: whether vLLM's call that takes and answers ids (`TOKENS_CALL`) is there and open.
    """

    engine: Engine
    version: str
    model: str
    path: str
    tokenizer: str
    context: int | None
    status: Mapping[str, Any] | None
    computes: Mapping[str, str] = field(default_factory=dict)
    takes_tokens: bool = False

    @property
    def fingerprint(self) -> str | None:
        """Of the model's routers."""
        return None if self.status is None else str(self.status["fingerprint"])

    @property
    def mask(self) -> str | None:
        """Hash of the mask in force; None under none, or where nobody knows."""
        return ((self.status or {}).get("mask") or {}).get("hash")

    @property
    def num_kept(self) -> list[int] | None:
        """Experts that each layer may route to; None where nobody knows."""
        if self.status is None:
            return None
        mask = self.status["mask"]
        return list(mask["num_kept"]) if mask else [self.status["num_experts"]] * self.status["num_layers"]

    @property
    def top_k(self) -> int | None:
        """Experts of each token."""
        return None if self.status is None else self.status["top_k"]

    @property
    def epoch(self) -> int | None:
        """Number of the mask in force, counted from the server's start."""
        return None if self.status is None else int(self.status["mask_epoch"])


def mask_name(mask: str | None, fingerprint: str | None) -> str:
    """What was in force, in a word: a server that does not say what it serves may well have had a mask."""
    return mask or ("unknown" if fingerprint is None else "none")


def ask_served(client: ServerClient) -> Served:
    """Ask a server what it is.

    Raises:
        ServerCallError: it does not answer, refuses a key, or is neither vLLM nor SGLang.
    """
    engine, version, about = _engine(client)
    answer = client.get("/v1/models")
    try:
        card = answer["data"][0]
        model, context = str(card["id"]), card.get("max_model_len")
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ServerCallError(client.url, 200, "", f"/v1/models: found {shortened(answer)}; expected a model") from None
    status = _if_there(client.status)
    path = (status or {}).get("model") or about.get("model_path") or card.get("root") or model
    tokenizer = about.get("tokenizer_path") or path
    said = {**{name: about.get(name) for name in _COMPUTES}, **{name: (status or {}).get(name) for name in ("device", "moe_backend")}}
    computes = {name: str(value) for name, value in said.items() if value is not None}
    tokens = engine == "vllm" and _takes_tokens(client)
    return Served(
        engine, version, model, str(path), str(tokenizer), context if isinstance(context, int) else None, status, computes, tokens
    )  # fmt: skip


def _engine(client: ServerClient) -> tuple[Engine, str, Mapping[str, Any]]:
    places: tuple[tuple[Engine, str], ...] = (("vllm", "/version"), ("sglang", "/server_info"), ("sglang", "/get_server_info"))
    for engine, path in places:
        about = _if_there(partial(client.get, path))
        if isinstance(about, dict) and isinstance(about.get("version"), str):
            return engine, about["version"], about
    found = "no version at vLLM's /version or SGLang's /server_info"
    raise ServerCallError(client.url, 404, "", f"found {found}; expected one of these servers")


def _takes_tokens(client: ServerClient) -> bool:
    """Whether a call that lacks everything is refused for what it lacks: it is not there in older vLLMs, and closed in newer ones (403)."""
    try:
        client.post(TOKENS_CALL, {})
    except ServerCallError as error:
        if error.status is None:
            raise
        return error.status in (400, 422) and "token_ids" in error.message
    return False


def _if_there(ask: Callable[[], Any]) -> Any:
    """What a call answers; None where the server has no such call."""
    try:
        return ask()
    except ServerCallError as error:
        if error.status == 404:
            return None
        raise


def check_context(served: Served, url: str, length: int) -> None:
    """Refuse blocks that do not fit, with the one token that engines want room for.

    Raises:
        ServerCallError: so.
    """
    if served.context is not None and served.context <= length:
        flag = {"vllm": "--max-model-len", "sglang": "--context-length"}[served.engine]
        found = f"found a context of {served.context} tokens; expected at least {length + 1} for blocks of {length} ({flag})"
        raise ServerCallError(url, 200, "", found)


def check_tokenizer(client: ServerClient, served: Served, text: str, ids: Sequence[int], largest: int) -> str | None:
    """Have the server tokenise a text, and compare.

    Args:
        client, served: the server.
        text, ids: of the packs, and as their tokenizer cuts it.
        largest: id in the packs' blocks.

    Returns:
        A warning if the server does not tokenise.

    Raises:
        InputError: the tokenizers differ, or ids are beyond the vocabulary of a checkpoint that lies on this machine.
        ServerCallError: no answer, or another one than tokens.
    """
    _check_vocabulary(served, largest)
    try:
        answer = client.post("/tokenize", {"model": served.model, "prompt": text, "add_special_tokens": False})
    except ServerCallError as error:
        if not _has_no_tokenizer(error):
            raise
        return f"{client.url} does not tokenise (HTTP {error.status}), so nobody knows whether its tokenizer is the packs'"
    theirs = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(theirs, list):
        raise ServerCallError(client.url, 200, "", f"/tokenize: found {shortened(answer)}; expected tokens")
    own = list(ids)
    if theirs != own:
        at = next((i for i, (a, b) in enumerate(zip(theirs, own, strict=False)) if a != b), min(len(own), len(theirs)))
        found = f"{len(own)} tokens of a text, {_ids(own, at)} from token {at} on"
        raise InputError("--tokenizer", "", found, f"the server's {len(theirs)}, {_ids(theirs, at)}: another tokenizer")
    return None


def _has_no_tokenizer(error: ServerCallError) -> bool:
    """Whether a server has no such call, or no tokenizer (--skip-tokenizer-init): any other answer leaves it unknown what it has."""
    text = error.message.lower()
    # vLLM names its option, with HTTP 400; SGLang's handler trips over what is not there, with HTTP 500.
    return error.status in (404, 405, 501) or "skip_tokenizer_init" in text or "'nonetype' object has no attribute 'encode'" in text


def _ids(ids: list[int], at: int) -> str:
    return ", ".join(map(str, ids[at : at + 3])) or "none"


def _check_vocabulary(served: Served, largest: int) -> None:
    """Before anything is sent: vLLM without a tokenizer does not look, and its engine dies of it."""
    folder = Path(served.path)
    if not (folder / "config.json").is_file():
        return
    size = read_config(folder).get("vocab_size")
    if isinstance(size, int) and largest >= size:
        raise InputError("--tokenizer", "", f"token {largest}", f"ids below {size}, the vocabulary of {served.path}")
