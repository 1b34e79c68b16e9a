"""A client of the control API: one server, or several replicas that are to serve the same mask."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from softprune.control import IN_FLIGHT, KEY_ENV, KEY_HEADER, PREFIX, bearer, client_key
from softprune.errors import InputError, MaskError, SoftpruneError, shortened
from softprune.mask import ExpertMask


@dataclass(eq=False)
class ServerCallError(SoftpruneError):
    """A server refused a call, or did not answer it.

    Attributes:
        url: the server.
        status: HTTP status, or None if no answer came; then nobody knows whether the call took effect.
        kind: the API's error type, e.g. "top_k_is_fixed_at_launch"; "" where the answer was not the API's.
        message: what the server said, or what happened to the connection.
        detail: further facts that the API sent.
    """

    url: str
    status: int | None
    kind: str
    message: str
    detail: Any = None

    def __reduce__(self) -> tuple[type[ServerCallError], tuple[Any, ...]]:
        return type(self), (self.url, self.status, self.kind, self.message, self.detail)

    def __str__(self) -> str:
        what = " ".join(str(part) for part in ("HTTP" if self.status else None, self.status, self.kind) if part)
        return f"{self.url}: {what or 'no answer'}: {self.message}"


class ReplicasError(SoftpruneError):
    """A mask was not put in force everywhere.

    Attributes:
        put_back: replicas that had changed, or may have, and have their old mask again.
        left: replica -> what it is left with, where putting back failed as well; empty if all replicas are as they were.
    """

    def __init__(self, message: str, put_back: Sequence[str] = (), left: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.put_back, self.left = list(put_back), left or {}


class ServerClient:
    """Calls one server's control API. Every call raises `ServerCallError`.

    Args:
        url: the server, e.g. http://127.0.0.1:30000.
        key: softprune's key; else SOFTPRUNE_KEY's; else the one that a server on this machine left in a file, which is sent
            to a loopback address only. Redirects and proxies are never followed, so the key goes nowhere else.
        timeout: seconds that a question may take.
        switch_timeout: seconds that a switch may take; with in_flight=drain, running requests end first.
        engine_key: what the engine itself asks for (its --api-key); sent with every call.

    Attributes:
        epoch: mask epoch that this client's last switch began; None before one, and if what became of it is not known.

    Raises:
        InputError: no such URL, or a key that cannot be sent.
    """

    def __init__(
        self, url: str, key: str | None = None, timeout: float = 60.0, switch_timeout: float = 600.0, engine_key: str | None = None
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise InputError("--url", "", shortened(url), "http://HOST:PORT") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
            raise InputError("--url", "", shortened(url), "http://HOST:PORT")
        self.url, self.timeout, self.switch_timeout = url.rstrip("/"), timeout, switch_timeout
        self.epoch: int | None = None
        self.key = key or known_key(parts.hostname, port)
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise InputError(f"--key or {KEY_ENV}", "", "characters that no HTTP header can hold", "printable ASCII")
        self.engine_key, self._headers = engine_key, {"Content-Type": "application/json", **bearer(engine_key)}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def status(self) -> dict[str, Any]:
        """What the server serves, and how many requests in flight ran under an earlier mask (`crossed_requests`)."""
        return self._object("GET", "/status")

    def mask(self) -> ExpertMask | None:
        """The mask in force, or None."""
        mask = self._object("GET", "/mask").get("mask")
        try:
            return None if mask is None else ExpertMask.parse(mask, f"{self.url}: mask in force")
        except MaskError as error:
            raise ServerCallError(self.url, 200, "", str(error)) from None

    def put_mask(self, mask: ExpertMask | bytes, in_flight: str = "continue") -> dict[str, Any]:
        """Put a mask in force.

        Args:
            mask: a mask, or a mask file's bytes, which the server checks.
            in_flight: what becomes of running requests: "continue", "drain" or "retract".

        Returns:
            {"epoch", "ms", "in_flight", "mask": {"hash", "num_kept"}}.
        """
        body = mask.dump().encode() if isinstance(mask, ExpertMask) else mask
        return self._switched("PUT", in_flight, body)

    def delete_mask(self, in_flight: str = "continue") -> dict[str, Any]:
        """Back to the unpruned router; as `put_mask`, with "mask": None."""
        return self._switched("DELETE", in_flight)

    def switch(self, mask: ExpertMask | None, in_flight: str = "continue") -> dict[str, Any]:
        """`put_mask`, or `delete_mask` for None."""
        return self.delete_mask(in_flight) if mask is None else self.put_mask(mask, in_flight)

    def _switched(self, method: str, in_flight: str, body: bytes | None = None) -> dict[str, Any]:
        self.epoch = None
        answer = self._object(method, "/mask?" + urlencode({"in_flight": in_flight}), body, self.switch_timeout)
        self.epoch = answer["epoch"]
        return answer

    def verify(self) -> dict[str, Any]:
        """Have every router run once and see that it obeys: {"obeyed", "detail": None or what was found}."""
        return self._object("POST", "/verify")

    def routes(self, reset: bool = False, trace: bool = False) -> dict[str, Any]:
        """What the routers selected since the last reset: {"tokens": [per layer], "counts": [[per expert] per layer], …}.

        Raises:
            ServerCallError: 409 probe_is_off, unless the server runs with --softprune-debug-routes.
        """
        return self._object("DELETE" if reset else "GET", "/routes" + ("?trace=1" if trace else ""))

    def start_stats(
        self, mode: str = "router", sample: int | None = None, attribution: str | None = None, shadow: bool = False
    ) -> dict[str, Any]:
        """Begin to collect statistics.

        Args:
            mode: "router", "reap" or "eaft".
            sample: N to sample 1 token in N; None leaves it to the server.
            attribution: of "eaft", "predictor" or "target"; None leaves it to the server.
            shadow: also count what the router would choose without a mask, of sampled tokens.

        Returns:
            Statistics' state, as in `status()["statistics"]`.

        Raises:
            ServerCallError: 409 statistics_are_off or mode_is_off, unless the server runs with --softprune-stats and at least this mode;
                409 already_collecting, or sampled_otherwise than what is kept.
        """
        asked = {"mode": mode, "sample": sample, "attribution": attribution, "shadow": shadow or None}
        given = {name: value for name, value in asked.items() if value is not None}
        return self._object("POST", "/stats/start", json.dumps(given).encode())

    def stop_stats(self) -> dict[str, Any]:
        """Collect no more; what was counted stays. As `start_stats`, but 409 not_collecting."""
        return self._object("POST", "/stats/stop")

    def reset_stats(self) -> dict[str, Any]:
        """Forget what was counted, under all masks. As `start_stats`."""
        return self._object("POST", "/stats/reset")

    def stats_file(self, mask: str | None = None) -> bytes:
        """The statistics file of one mask: its bytes, for `softprune.stats.file.read`.

        Args:
            mask: hash of the mask under which it was counted, "none" for the unpruned router; None for the mask in force.

        Raises:
            ServerCallError: 404 never_started or nothing_counted.
        """
        path = PREFIX + "/stats" + ("" if mask is None else "?" + urlencode({"mask": mask}))
        return self._bytes("GET", path, None, self._key_header, self.switch_timeout)

    def request(self, request_id: str) -> dict[str, Any]:
        """The mask epochs of one request: {"id", "epochs", "masks", "parts", "finished"}."""
        return self._object("GET", "/requests/" + quote(request_id, safe=""))

    def post(self, path: str, body: Any) -> Any:
        """Call the engine's own API with JSON; without softprune's key."""
        return self._call("POST", path, json.dumps(body).encode(), {}, self.switch_timeout)

    def get(self, path: str) -> Any:
        """Ask the engine's own API for JSON; without softprune's key."""
        return self._call("GET", path, None, {}, self.timeout)

    @property
    def _key_header(self) -> dict[str, str]:
        return {KEY_HEADER: self.key} if self.key else {}

    def _object(self, method: str, path: str, body: bytes | None = None, timeout: float | None = None) -> dict[str, Any]:
        answer = self._call(method, PREFIX + path, body, self._key_header, timeout or self.timeout)
        if not isinstance(answer, dict):
            raise ServerCallError(self.url, 200, "", f"found {shortened(answer)}; expected softprune's control API")
        return answer

    def _call(self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout: float) -> Any:
        text = self._bytes(method, path, body, headers, timeout)
        try:
            return json.loads(text)
        except ValueError:
            raise ServerCallError(self.url, 200, "", f"found {shortened(text[:100])}; expected JSON") from None

    def _bytes(self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout: float) -> bytes:
        call = urllib.request.Request(self.url + path, data=body, headers={**self._headers, **headers}, method=method)
        try:
            try:
                with self._opener.open(call, timeout=timeout) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    raise self._refusal(error.code, error.read()) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise ServerCallError(self.url, None, "", str(reason) or repr(reason)) from None

    def _refusal(self, status: int, text: bytes) -> ServerCallError:
        try:
            answer = json.loads(text)
            error = answer.get("error", answer)  # SGLang's OpenAI API puts its fields side by side
            return ServerCallError(self.url, status, str(error["type"]), str(error["message"]), error.get("detail"))
        except (ValueError, KeyError, TypeError, AttributeError):
            hint = "; a server with softprune answers this when it was started with --softprune-control" if status == 404 else ""
            return ServerCallError(self.url, status, "", shortened(text[:200].decode(errors="replace")) + hint)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would carry the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


def known_key(host: str, port: int) -> str | None:
    """The key for a server that was given none: SOFTPRUNE_KEY's, else, on this machine only, the one that the server left.

    Args:
        host, port: of the server.
    """
    return client_key(port) if is_loopback(host) else os.environ.get(KEY_ENV)


def without_address(text: str, servers: Mapping[str, str]) -> str:
    """A text with names in place of servers' addresses, for files that others may read.

    Args:
        text: e.g. an error, which begins with the server's URL.
        servers: what to call each one ("the server", "server A") -> its URL. A host that several share is "the server's host".

    Returns:
        The text with URLs, HOST:PORT and bare hosts replaced.
    """
    names: dict[str, str] = {}
    for name, url in servers.items():
        parts = urlsplit(url)
        if not (host := parts.hostname):
            continue
        port = parts.port or (443 if parts.scheme == "https" else 80)
        inner = f"[{host}]" if ":" in host else host
        for address in (url.rstrip("/"), f"{parts.scheme}://{parts.netloc}", parts.netloc, f"{inner}:{port}", f"{host}:{port}"):
            names.setdefault(address.lower(), name)
        hosts = (inner, host)
        names.update({one: name if names.get(one, name) == name else "the server's host" for one in hosts})
    if not names:
        return text
    # The longest first, and none inside a longer word, number or host name.
    known = "|".join(re.escape(address) for address in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<![\w.-])(?:{known})(?![\w-]|\.\w)", lambda found: names[found[0].lower()], text, flags=re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's, without asking a name server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def apply_to_all(clients: Sequence[ServerClient], mask: ExpertMask | None, in_flight: str = "continue") -> list[dict[str, Any]]:
    """Put a mask in force on several replicas of one model, or on none.

    All are asked first; then one after another is switched. If one fails, those already switched, and the one that failed
    unless it refused, get their old masks back. So they do when Ctrl-C interrupts.

    Args:
        clients: one for each replica.
        mask: None for no mask.
        in_flight: as for `ServerClient.put_mask`; also how old masks are put back.

    Returns:
        Each replica's answer, in order; see `ServerClient.put_mask`.

    Raises:
        ReplicasError: every replica serves what it served before, or the error's `left` says what else.
    """
    if in_flight not in IN_FLIGHT:
        raise InputError("--in-flight", "", repr(in_flight), f"one of {', '.join(IN_FLIGHT)}")
    try:
        before = [(client.status(), client.mask()) for client in clients]
    except ServerCallError as error:
        raise ReplicasError(f"{error}; no replica was changed") from None
    for field in ("fingerprint", "top_k"):
        found = [status.get(field) for status, _ in before]
        if any(value != found[0] for value in found):
            values = ", ".join(f"{value} at {client.url}" for client, value in zip(clients, found, strict=True))
            raise ReplicasError(f"the replicas differ in {field}: {values}; no replica was changed")
    answers: list[dict[str, Any]] = []
    try:
        for client in clients:
            answers.append(client.switch(mask, in_flight))
    except BaseException as error:
        refused = isinstance(error, ServerCallError) and error.status is not None and 400 <= error.status < 500
        changed = list(zip(clients, before, strict=True))[: len(answers) + (not refused)]
        why = str(error) if isinstance(error, SoftpruneError) else f"stopped ({type(error).__name__})"
        raise _put_back(why, [(client, old) for client, (_, old) in changed], mask, in_flight, len(answers)) from error
    return answers


def _put_back(
    why: str, changed: Sequence[tuple[ServerClient, ExpertMask | None]], new: ExpertMask | None, in_flight: str, certain: int
) -> ReplicasError:
    """Give replicas their old masks back, and say how that went.

    Args:
        why: they are to have them back.
        changed: replicas and their old masks.
        new, in_flight: what was asked for.
        certain: so many of `changed` have the new mask; of the others nobody knows.
    """
    put_back: list[str] = []
    left: dict[str, str] = {}
    for number, (client, old) in enumerate(changed):
        try:
            client.switch(old, in_flight)
            put_back.append(client.url)
        except ServerCallError as error:
            known = number < certain and error.status is not None
            masks = f"with {_name(new)}" if known else f"with {_name(new)} or its old one, {_name(old)}: it did not answer"
            left[client.url] = f"{masks} ({error.kind or error.message})"
    message = [why]
    if put_back:
        message.append(f"put back: {', '.join(put_back)} (old mask in force again)")
    message.extend(f"NOT PUT BACK: {url} is left {what}" for url, what in left.items())
    message.append(
        "THE REPLICAS MAY NOW DIFFER: apply a mask to all of them again" if left else "every replica serves what it served before"
    )
    return ReplicasError("\n  ".join(message), put_back, left)


def _name(mask: ExpertMask | None) -> str:
    return "no mask" if mask is None else f"mask {mask.hash[:19]}…"


def wait_until_crossed(clients: Sequence[ServerClient], seconds: float, poll: float = 0.2) -> None:
    """Wait until no request in flight ran under an earlier mask, on any replica.

    Args:
        seconds: longest wait.
        poll: seconds between two questions.

    Raises:
        ReplicasError: some still run then, or a replica cannot be asked; the masks in force stay.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            running = {client.url: client.status()["crossed_requests"] for client in clients}
        except ServerCallError as error:
            raise ReplicasError(f"{error}; the switch itself is done") from None
        behind = ", ".join(f"{number} at {url}" for url, number in running.items() if number)
        if not behind:
            return
        if time.monotonic() >= deadline:
            late = f"after {seconds:g} s, requests that ran under an earlier mask still run"
            raise ReplicasError(f"{late}: {behind}; the switch itself is done")
        time.sleep(min(poll, max(0.0, deadline - time.monotonic())))
