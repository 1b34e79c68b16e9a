"""`softprune server …` against the control API of small fake engines on real ports."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from softprune.bench.server import free_port
from softprune.cli import app
from softprune.control import ENGINE_KEY_ENV, KEY_ENV, KEY_HEADER, ControlError, key_file
from softprune.errors import InputError
from softprune.mask import ExpertMask
from softprune.server_client import ReplicasError, ServerCallError, ServerClient, apply_to_all, is_loopback, wait_until_crossed
from tests.conftest import saved
from tests.unit.fake_control import REFUSED, FakeControl, FakeEngine, ServedFake, make_launch, make_mask, make_model

FIRST, SECOND = make_mask([[0, 1, 2], None, [3, 4]]), make_mask([[5, 6], [1, 2, 3], [0, 7]])
Start = Callable[..., ServedFake]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a key of the machine's, nor one in the environment."""
    monkeypatch.delenv(KEY_ENV, raising=False)
    monkeypatch.delenv(ENGINE_KEY_ENV, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def start() -> Iterator[Start]:
    """start(key=..., engine=...): one more fake server."""
    with ExitStack() as stack:

        def one(key: str = "right", engine: FakeEngine | None = None) -> ServedFake:
            return stack.enter_context(ServedFake(FakeControl(engine or FakeEngine(), key)))

        yield one


def clients(*servers: ServedFake, **options: Any) -> list[ServerClient]:
    return [ServerClient(server.url, server.api.key, **options) for server in servers]


def cli(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["server", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def urls(*servers: ServedFake) -> list[str]:
    return [part for server in servers for part in ("--url", server.url)]


def in_force(*servers: ServedFake) -> list[ExpertMask | None]:
    return [server.api.in_force for server in servers]


class Catcher(HTTPServer):
    """Answers every call with a redirect, or 404, and keeps its headers."""

    def __init__(self, location: str | None = None) -> None:
        self.caught: list[dict[str, str]] = []
        catcher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                catcher.caught.append({name.lower(): value for name, value in self.headers.items()})
                self.send_response(302 if location else 404)
                if location:
                    self.send_header("location", location)
                self.send_header("content-length", "0")
                self.end_headers()

            do_PUT = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Catcher:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def test_every_call(start: Start) -> None:
    server = start(engine=FakeEngine(ranks=2, launch=make_launch(debug_routes=True)))
    server.engine.ranks[1].add_probe()
    (client,) = clients(server)
    status = client.status()
    assert (status["engine"], status["mask"], status["mask_epoch"]) == ("vLLM 0.32.0", None, 0)
    assert client.mask() is None
    answer = client.put_mask(FIRST, "drain")
    assert (answer["epoch"], answer["in_flight"], answer["mask"]) == (1, "drain", {"hash": FIRST.hash, "num_kept": [3, 8, 2]})
    assert client.mask() == FIRST
    assert client.put_mask(SECOND.dump().encode())["mask"]["hash"] == SECOND.hash
    assert client.verify() == {"obeyed": True, "detail": None}
    assert client.delete_mask()["mask"] is None
    assert client.switch(FIRST)["epoch"] == 4
    assert client.switch(None)["epoch"] == 5
    server.engine.epochs.stamp(["odd/id ?#%"], 1)
    assert client.request("odd/id ?#%")["epochs"] == [5]
    assert client.routes()["tokens"] == [0, 0, 0]
    assert "ids" in client.routes(reset=True, trace=True)
    scored = client.post("/v1/completions", {"prompt": [100, 101], "max_tokens": 2})
    assert scored["id"] == "cmpl-1"


def test_errors_say_who_and_what(start: Start) -> None:
    server = start()
    (client,) = clients(server)
    for make, status, kind, message in (
        (lambda: client.put_mask(b"{"), 400, "invalid_mask", "request body: found no valid JSON"),
        (lambda: client.put_mask(FIRST.model_copy(update={"top_k": 1})), 409, "top_k_is_fixed_at_launch", "expected 2, which this server"),
        (lambda: client.put_mask(FIRST, "stop"), 400, "invalid_in_flight", "found 'stop'"),
        (lambda: client.request("no"), 404, "not_found", "no request no"),
        (client.routes, 409, "probe_is_off", "--softprune-debug-routes"),
        (ServerClient(server.url, "wrong").status, 401, "unauthorized", KEY_HEADER),
        (ServerClient(server.url).status, 401, "unauthorized", KEY_HEADER),
        (ServerClient(f"{server.url}/elsewhere", "right").status, 404, "", "--softprune-control"),
    ):
        with pytest.raises(ServerCallError) as caught:
            make()
        error = caught.value
        assert (error.status, error.kind) == (status, kind)
        assert message in error.message
        assert str(error).startswith(f"{error.url}: HTTP {status}")
    with pytest.raises(ServerCallError) as caught:
        ServerClient(f"http://127.0.0.1:{free_port()}", "right").status()
    assert (caught.value.status, "no answer: " in str(caught.value)) == (None, True)
    assert "Connection refused" in str(caught.value)
    server.api.switches = [1.0]
    with pytest.raises(ServerCallError) as caught:
        ServerClient(server.url, "right", switch_timeout=0.1).put_mask(FIRST)
    assert (caught.value.status, "timed out" in str(caught.value)) == (None, True)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:1", "", "ftp://x", "http://", "http://x:port", "http://x:99999", "http://me@127.0.0.1:1", "http://x?y", "http://x#y"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(InputError, match="--url: found .*; expected http://HOST:PORT"):
        ServerClient(url)


def test_which_key_is_sent_where(monkeypatch: pytest.MonkeyPatch) -> None:
    file = key_file(30000)
    file.parent.mkdir(parents=True)
    file.write_text("of-the-file\n")
    here = ["http://127.0.0.1:30000", "http://localhost:30000", "http://[::1]:30000", "https://127.3.2.1:30000/proxied/"]
    elsewhere = [
        "http://example.com:30000", "http://10.0.0.1:30000", "http://0.0.0.0:30000", "http://localhost.example.com:30000",
        "http://127.0.0.1.example.com:30000", "http://[::]:30000", "http://gpu-box:30000",
    ]  # fmt: skip
    assert [ServerClient(url).key for url in here] == ["of-the-file"] * len(here)
    assert [ServerClient(url).key for url in elsewhere] == [None] * len(elsewhere)
    assert ServerClient("http://127.0.0.1:30001").key is None
    # What the user says goes where the user says.
    monkeypatch.setenv(KEY_ENV, "of-the-user")
    assert {ServerClient(url).key for url in here + elsewhere} == {"of-the-user"}
    assert {ServerClient(url, "given").key for url in here + elsewhere} == {"given"}
    for key in ("ü", "a\nb", "a\r\nx-evil: 1"):
        with pytest.raises(InputError, match="--key or SOFTPRUNE_KEY"):
            ServerClient(here[0], key)
    assert not is_loopback("127.0.0.1.example.com")


def test_the_key_follows_no_redirect_and_no_proxy(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    with Catcher() as thief, Catcher(f"{thief.url}/status") as server:
        for method in (ServerClient(server.url, "secret").status, lambda: ServerClient(server.url, "secret").put_mask(FIRST)):
            with pytest.raises(ServerCallError, match="HTTP 302"):
                method()
        assert {headers[KEY_HEADER.lower()] for headers in server.caught} == {"secret"}
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, thief.url)
        assert ServerClient(start().url, "right").status()["mask"] is None
        assert thief.caught == []


def test_the_engines_own_api_is_not_told_the_key() -> None:
    with Catcher() as server:
        with pytest.raises(ServerCallError):
            ServerClient(server.url, "secret").status()
        with pytest.raises(ServerCallError, match="HTTP 501"):
            ServerClient(server.url, "secret").post("/generate", {})
        assert [KEY_HEADER.lower() in headers for headers in server.caught] == [True]


def test_all_replicas_get_the_mask(start: Start) -> None:
    servers = [start(f"key{number}") for number in range(3)]
    answers = apply_to_all(clients(*servers), FIRST, "drain")
    assert in_force(*servers) == [FIRST] * 3
    assert [(answer["epoch"], answer["in_flight"]) for answer in answers] == [(1, "drain")] * 3
    apply_to_all(clients(*servers), FIRST)  # again: nothing to skip
    assert [server.engine.epochs.current for server in servers] == [2] * 3
    apply_to_all(clients(*servers), None)
    assert in_force(*servers) == [None] * 3
    with pytest.raises(InputError, match="--in-flight"):
        apply_to_all(clients(*servers), None, "stop")


def test_nothing_is_changed_unless_all_can_be_asked(start: Start) -> None:
    one, two = start(), start()
    for other, message in (
        (ServerClient(f"http://127.0.0.1:{free_port()}", "right"), "Connection refused"),
        (ServerClient(two.url, "wrong"), "unauthorized"),
        (clients(start(engine=FakeEngine(seed=1)))[0], "differ in fingerprint: sha256:"),
        (clients(start(engine=FakeEngine(launch=make_launch(top_k=1))))[0], "differ in top_k: "),
    ):
        for order in ([*clients(one, two), other], [other, *clients(one, two)]):
            with pytest.raises(ReplicasError) as caught:
                apply_to_all(order, FIRST)
            assert message in str(caught.value)
            assert "no replica was changed" in str(caught.value)
            assert (caught.value.put_back, caught.value.left) == ([], {})
    assert one.api.asked == two.api.asked == []


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_refusal_gives_the_others_their_old_masks_back(start: Start, fails: int) -> None:
    servers = [start() for _ in range(3)]
    servers[0].api.engine.ranks[0].routers.apply(SECOND)
    before = in_force(*servers)
    servers[fails].api.switches = [REFUSED]
    with pytest.raises(ReplicasError) as caught:
        apply_to_all(clients(*servers), FIRST, "drain")
    assert in_force(*servers) == before == [SECOND, None, None]
    error = caught.value
    assert (error.put_back, error.left) == ([server.url for server in servers[:fails]], {})
    assert str(error).startswith(f"{servers[fails].url}: HTTP 409 refused: not now")
    assert str(error).endswith("every replica serves what it served before")
    assert all(server.url in str(error) for server in servers[:fails])
    # Asked once to switch and once to switch back; the one that refused only once, those after it never.
    assert [len(server.api.asked) for server in servers] == [2] * fails + [1] + [0] * (2 - fails)
    assert all(in_flight == "drain" for server in servers for _, in_flight in server.api.asked)


def test_one_that_did_not_answer_is_put_back_too(start: Start) -> None:
    """Its switch took effect, only nobody heard of it."""
    one, two = start(), start()
    two.api.switches = [3.0]
    with pytest.raises(ReplicasError) as caught:
        apply_to_all([*clients(one), *clients(two, switch_timeout=0.3)], FIRST)
    assert "timed out" in str(caught.value)
    # The second call waited for the first, beyond its own time as well: nobody knows, and that is said.
    assert caught.value.put_back == [one.url]
    assert list(caught.value.left) == [two.url]
    assert "or its old one, no mask: it did not answer" in caught.value.left[two.url]
    deadline = time.monotonic() + 30
    while len(two.api.asked) < 2 or in_force(one, two) != [None, None]:  # it does get its old mask back in the end
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_error_of_a_server_is_no_refusal(start: Start) -> None:
    one, two = start(), start()
    two.api.switches = [ValueError("after the switch, for all that a client knows")]
    with pytest.raises(ReplicasError) as caught:
        apply_to_all(clients(one, two), FIRST)
    assert caught.value.put_back == [one.url, two.url]
    assert [len(server.api.asked) for server in (one, two)] == [2, 2]
    assert in_force(one, two) == [None, None]


def test_what_cannot_be_put_back_is_said_loudly(start: Start) -> None:
    one, two, three = start(), start(), start()
    one.api.switches = [None, ControlError(409, "drain_timed_out", "busy")]
    three.api.switches = [REFUSED]
    with pytest.raises(ReplicasError) as caught:
        apply_to_all(clients(one, two, three), FIRST)
    assert in_force(one, two, three) == [FIRST, None, None]
    error = caught.value
    assert (error.put_back, list(error.left)) == ([two.url], [one.url])
    assert f"NOT PUT BACK: {one.url} is left with mask {FIRST.hash[:19]}… (drain_timed_out)" in str(error)
    assert str(error).endswith("THE REPLICAS MAY NOW DIFFER: apply a mask to all of them again")


def test_a_replica_that_dies_is_not_waited_for(start: Start) -> None:
    one, two = start(), start()
    pair = clients(one, two)
    real = pair[1].switch

    def die(*arguments: Any) -> dict[str, Any]:
        two.__exit__()
        return real(*arguments)

    pair[1].switch = die  # type: ignore[method-assign]
    with pytest.raises(ReplicasError) as caught:
        apply_to_all(pair, FIRST)
    assert (caught.value.put_back, list(caught.value.left)) == ([one.url], [two.url])
    assert in_force(one) == [None]


def test_ctrl_c_gives_the_old_masks_back(start: Start) -> None:
    one, two = start(), start()
    pair = clients(one, two)
    real, calls = pair[1].switch, 0

    def interrupted(*arguments: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        answer = real(*arguments)
        if calls == 1:
            raise KeyboardInterrupt
        return answer

    pair[1].switch = interrupted  # type: ignore[method-assign]
    with pytest.raises(ReplicasError, match="stopped .KeyboardInterrupt.") as caught:
        apply_to_all(pair, FIRST)
    assert caught.value.put_back == [one.url, two.url]
    assert in_force(one, two) == [None, None]


def test_waiting_for_requests_that_crossed(start: Start) -> None:
    one, two = start(), start()
    one.engine.epochs.stamp(["slow"], 1)
    apply_to_all(clients(one, two), FIRST)
    timer = threading.Timer(0.4, lambda: one.engine.epochs.finish("slow"))
    began = time.monotonic()
    timer.start()
    wait_until_crossed(clients(one, two), 20, poll=0.02)
    assert 0.3 < time.monotonic() - began < 10
    wait_until_crossed(clients(one, two), 0)
    two.engine.epochs.stamp(["slower", "slowest"], 1)
    apply_to_all(clients(one, two), None)
    with pytest.raises(ReplicasError, match=f"after 0.1 s, .* still run: 2 at {two.url}; the switch itself is done"):
        wait_until_crossed(clients(one, two), 0.1, poll=0.02)
    with pytest.raises(ReplicasError, match="Connection refused.*; the switch itself is done"):
        wait_until_crossed([ServerClient(f"http://127.0.0.1:{free_port()}", "x")], 1)


@pytest.mark.parametrize("command", ["server", "server status", "server apply", "server clear", "selftest"])
def test_help(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert (result.exit_code, "Usage:" in result.output) == (0, True)


def test_cli_apply_status_clear(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = start(), start()
    both, key, file = urls(one, two), ("--key", "right"), saved(FIRST, tmp_path / "m.json")
    code, output = cli("apply", file, *both, *key, "--in-flight", "drain", "--wait", 5)
    assert code == 0, output
    lines = output.splitlines()
    assert lines[0].startswith(f"{one.url}: epoch 1, ")
    assert lines[0].endswith(" ms, 2 to 8 of 8 experts kept")
    assert lines[1].startswith(f"{two.url}: epoch 1, ")
    assert lines[2:] == ["no request in flight ran under an earlier mask"]
    assert in_force(one, two) == [FIRST, FIRST]
    monkeypatch.setenv(KEY_ENV, "right")
    code, output = cli("status", *both)
    assert code == 0, output
    lost = f"{two.url}: a restart returns to the launch mask"
    for text in (one.url, two.url, "vLLM 0.32.0", "fake", "2 to 8 of 8", FIRST.hash[:15], lost):
        assert text in output
    code, output = cli("clear", *both)
    assert (code, "epoch 2" in output, "all experts" in output) == (0, True, True), output
    assert in_force(one, two) == [None, None]
    code, output = cli("status", *both, "--json")
    rows = json.loads(output)
    assert [(row["url"], row["mask"], row["mask_epoch"]) for row in rows] == [(one.url, None, 2), (two.url, None, 2)]
    assert "a restart" not in cli("status", *both)[1]


def test_cli_finds_the_key_on_this_machine(start: Start) -> None:
    server = start()
    assert cli("status", *urls(server))[0] == 2
    file = key_file(server.port)
    file.parent.mkdir(parents=True)
    file.write_text("right")
    assert cli("status", *urls(server))[0] == 0


def test_cli_errors(start: Start, tmp_path: Path) -> None:
    one, two = start(), start()
    file = saved(FIRST, tmp_path / "m.json")
    two.api.switches = [REFUSED]
    code, output = cli("apply", file, *urls(one, two), "--key", "right")
    assert code == 2
    assert "409 refused: not now" in output
    assert f"put back: {one.url}" in output
    for arguments, message in (
        (("apply", tmp_path / "none.json", *urls(one)), "No such file"),
        (("apply", file, *urls(one, one)), "found the same server twice"),
        (("apply", file, "--url", "x"), "expected http://HOST:PORT"),
        (("apply", file, *urls(one), "--in-flight", "stop"), "--in-flight"),
        (("clear", *urls(one), "--key", "wrong"), "HTTP 401 unauthorized"),
        (("status", *urls(one), "--key", "wrong"), "HTTP 401 unauthorized"),
        (("status",), "--url"),
    ):
        code, output = cli(*arguments)
        assert (code, message in output) == (2, True), (arguments, output)
    one.engine.epochs.stamp(["slow"], 1)
    code, output = cli("apply", file, *urls(one), "--key", "right", "--wait", 0.2)
    assert (code, "1 at http" in output, in_force(one)) == (2, True, [FIRST]), output


def test_cli_status_shows_those_that_answer(start: Start) -> None:
    server, gone = start(), f"http://127.0.0.1:{free_port()}"
    code, output = cli("status", *urls(server), "--url", gone, "--key", "right")
    assert code == 2
    assert "8 of 8" in output
    assert f"error: {gone}: no answer: " in output
    code, output = cli("status", *urls(server), "--url", gone, "--key", "right", "--json")
    assert code == 2
    rows = json.loads(output)
    assert [("error" in row) for row in rows] == [False, True]


def test_a_model_is_the_same_in_every_replica() -> None:
    """What the tests above stand on."""
    assert make_model().fingerprint == make_model().fingerprint != make_model(seed=1).fingerprint


def test_the_engines_own_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with ServedFake(engine_key="sk-engine") as server:
        status = ("status", "--url", server.url, "--key", "right")
        assert cli(*status)[0] == 2
        assert cli(*status, "--engine-key", "wrong")[0] == 2
        assert cli(*status, "--engine-key", "sk-engine")[0] == 0
        monkeypatch.setenv(ENGINE_KEY_ENV, "sk-engine")
        assert cli("apply", saved(FIRST, tmp_path / "first.json"), "--url", server.url, "--key", "right")[0] == 0
        assert server.api.in_force == FIRST
        assert cli("clear", "--url", server.url, "--key", "right")[0] == 0
    with pytest.raises(InputError, match="--engine-key"):
        ServerClient("http://127.0.0.1:1", engine_key="a\nb")
