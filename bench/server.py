"""One inference server as a process of its own: start it, wait for it, talk to it, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprune.control import KEY_ENV, KEY_HEADER
from softprune.errors import SoftpruneError


class ServerError(SoftpruneError):
    """A server did not come up; the message ends with its log."""


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on.

    Servers bind it only when they have started up, half a minute later. So it lies below the range from which systems give ports
    to whoever asks for any.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def vllm_command(model: str | Path, port: int, *args: str) -> list[str]:
    """Command line of vLLM's API server; the module, since CPU builds of vLLM cannot run `vllm serve`."""
    module = "vllm.entrypoints.openai.api_server"
    return [sys.executable, "-m", module, "--model", str(model), "--host", "127.0.0.1", "--port", str(port), *args]


_OWN_GROUP: Any = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


class Server:
    """A server process in its own process group, so that stopping it stops its workers as well.

    Not in its own session: Linux schedules sessions against each other (autogroup), and a client that mostly waits, in a session with
    other busy processes, was then kept from running for seconds on end by the server's threads.

    Args:
        command: its command line.
        port: the port in that command line.
        log: file for its output.
        key: softprune's key, given to it in SOFTPRUNE_KEY.
        env: further environment variables.
    """

    def __init__(self, command: Sequence[str], port: int, log: Path, key: str, env: Mapping[str, str] | None = None) -> None:
        self.port, self.log, self.key = port, log, key
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent,
                env={**os.environ, KEY_ENV: key, **(env or {})}, **_OWN_GROUP,
            )  # fmt: skip

    def wait_ready(self, seconds: float = 300) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: it ended, or said nothing in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"the server ended with status {self.process.returncode}:\n{self.text()[-4000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise ServerError(f"no answer within {seconds:.0f} s:\n{self.text()[-4000:]}")

    def text(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace")

    def request(self, method: str, path: str, body: Any = None, key: str | None = None, timeout: float = 120) -> tuple[int, Any]:
        """Send JSON, get (status, decoded JSON).

        Args:
            method, path, body: the call.
            key: sent as softprune's key instead of the server's own; "" sends none.
            timeout: seconds.
        """
        headers = {"content-type": "application/json", KEY_HEADER: self.key if key is None else key}
        if key == "":
            del headers[KEY_HEADER]
        data = None if body is None else json.dumps(body).encode()
        call = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(call, timeout=timeout) as response:
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def stop(self, grace: float = 20) -> None:
        """End the server and everything it started.

        Args:
            grace: seconds that it is given to finish by itself.
        """
        if grace and self.process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
