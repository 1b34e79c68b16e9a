"""Starting real vLLM servers, and running models offline, each with a bound on time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEY = "test-key"
BASE_ENV = {
    "PYTHONPATH": str(HERE / "plugins"), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1", "SOFTPRUNE_KEY": KEY,
}  # fmt: skip
SERVER_ARGS = ["--max-model-len", "2048", "--dtype", "bfloat16"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    """One `python -m vllm.entrypoints.openai.api_server` process and its HTTP address."""

    def __init__(self, model: Path, *args: str, log: Path, env: dict[str, str] | None = None, eager: bool = True) -> None:
        self.model, self.log, self.port = str(model), log, free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), *SERVER_ARGS, *(["--enforce-eager"] if eager else []), *args]
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **BASE_ENV, **(env or {})},
                cwd=log.parent, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self, seconds: float = 240) -> Server:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.text()[-4000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return self
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise TimeoutError(f"no answer within {seconds} s:\n{self.text()[-4000:]}")

    def wait_exit(self, seconds: float = 120) -> str:
        """Wait for the server to give up; its output. Fails if it comes up."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.3)
            if "Application startup complete" in self.text():
                self.stop()
                raise AssertionError("the server started, although it should have refused")
        code = self.process.poll()
        self.stop()
        assert code not in (None, 0), f"exit status {code}:\n{self.text()[-3000:]}"
        return self.text()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def request(self, method: str, path: str, body: Any = None, key: str | None = KEY, timeout: float = 120) -> tuple[int, Any]:
        headers = {"content-type": "application/json", **({"X-Softprune-Key": key} if key is not None else {})}
        data = None if body is None else json.dumps(body).encode()
        call = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(call, timeout=timeout) as response:
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def complete(self, prompt: list[int], max_tokens: int, **options: Any) -> Any:
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **options}
        status, answer = self.request("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run_offline(jobs: list[dict[str, Any]], folder: Path, env: dict[str, str] | None = None, timeout: float = 500) -> dict[str, Any]:
    """Run jobs of offline.py in one process; results by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with open(folder / "log.txt", "wb") as log:
        code = subprocess.run(
            [sys.executable, str(HERE / "offline.py"), "jobs.json", "results.json"],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT, timeout=timeout, env={**os.environ, **BASE_ENV, **(env or {})},
        ).returncode  # fmt: skip
    assert code == 0, (folder / "log.txt").read_text(errors="replace")[-5000:]
    results = {result["name"]: result for result in json.loads((folder / "results.json").read_text())}
    failed = {name: result["error"] for name, result in results.items() if "error" in result}
    assert not failed, f"{failed}\n{(folder / 'log.txt').read_text(errors='replace')[-5000:]}"
    return results
