"""`softprune selftest` against small fake engines: what passes, what must fail, and that the old mask always comes back."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from softprune.cli import app
from softprune.errors import InputError
from softprune.selftest import Check, Scores, SelfTest, half_mask
from softprune.server_client import ServerClient
from tests.conftest import saved
from tests.unit.fake_control import EXPERTS, REFUSED, FakeControl, FakeEngine, ServedFake, make_launch, make_mask, make_model

MASK = make_mask([[0, 1, 2], None, [3, 4]])


@pytest.fixture
def start() -> Iterator[Any]:
    """start(name=..., debug_routes=...): one more fake server."""
    with ExitStack() as stack:

        def one(name: str = "vLLM 0.32.0", **launch: Any) -> ServedFake:
            return stack.enter_context(ServedFake(FakeControl(FakeEngine(name, launch=make_launch(**launch)))))

        yield one


def cli(server: ServedFake, *arguments: object) -> tuple[int, list[str]]:
    options = ["selftest", "--url", server.url, "--key", "right", "--batch", "2", "--tokens", "5", *map(str, arguments)]
    result = CliRunner().invoke(app, options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output.splitlines()


def checks_of(server: ServedFake) -> dict[str, Check]:
    test = SelfTest(ServerClient(server.url, "right"), None, 2, 4)
    passed = test.run()
    assert passed == all(check.passed is not False for check in test.checks)
    return {check.name: check for check in test.checks}


def test_the_engines_own_key_goes_with_every_call() -> None:
    with ServedFake(engine_key="sk-engine") as server:
        assert cli(server)[0] == 2
        code, lines = cli(server, "--engine-key", "sk-engine")
        assert code == 0, lines


@pytest.mark.parametrize("name", ["vLLM 0.32.0", "SGLang 0.5.17"])
@pytest.mark.parametrize("probe", [True, False])
def test_a_server_that_obeys_passes(start: Any, name: str, probe: bool) -> None:
    server = start(name, debug_routes=probe)
    server.engine.step_s = (0.1, 0.05)
    code, lines = cli(server)
    assert code == 0, lines
    assert [line[:27].rstrip() for line in lines] == [
        "PASS routers obey", f"{'PASS' if probe else '-   '} real traffic obeys", "PASS mask changes answers", "PASS mask leaves no trace",
        "-    speed", "PASS put back",
    ]  # fmt: skip
    assert "4 of 8 experts kept" in lines[0]
    counted = "1,896 selections in 3 layers counted, all accounted for: none of a pruned expert"
    assert (counted if probe else "not counted: for that, the server has to run with --softprune-debug-routes") in lines[1]
    assert "two identical askings differ by up to 0" in lines[2]
    assert "differ by up to 0;" in lines[3]
    assert 1.0 < float(lines[4].split("×")[0].split()[-1]) < 2.5
    assert "no mask, in force before the test, is in force again" in lines[5]
    assert server.api.in_force is None
    path = "/generate" if name.startswith("SGLang") else "/v1/completions"
    assert server.engine.seen.count(path) == 4 * 4 + 2 * 6


def test_with_a_mask_given_and_one_in_force(start: Any, tmp_path: Path) -> None:
    server, before = start(), make_mask([[6, 7], [6, 7], [6, 7]])
    server.engine.ranks[0].routers.apply(before)
    code, lines = cli(server, "--mask", saved(MASK, tmp_path / "m.json"))
    assert code == 0, lines
    assert "2 to 8 of 8 experts kept" in lines[0]
    assert f"mask {before.hash[:19]}…, in force before the test, is in force again" in lines[-1]
    assert server.api.in_force == before


def test_noise_is_measured_and_allowed_for(start: Any) -> None:
    """Four prompts an asking, in the order without, without, with, without a mask."""
    server = start()
    server.engine.noise = iter([0.0] * 4 + [0.002] * 4 + [0.0] * 4 + [0.0015] * 4).__next__
    checks = checks_of(server)
    assert (checks["mask leaves no trace"].passed, checks["mask changes answers"].passed) == (True, True)
    assert "up to 0.0015; two identical askings differ by up to 0.002" in checks["mask leaves no trace"].detail
    server.engine.noise = iter([0.0] * 12 + [0.0015] * 4).__next__
    checks = checks_of(server)
    assert checks["mask leaves no trace"].passed is False


def test_a_mask_that_leaves_a_trace_fails(start: Any) -> None:
    server = start()
    server.engine.leaves_trace = True
    code, lines = cli(server)
    assert code == 1
    assert [line[:4] for line in lines] == ["PASS", "-   ", "PASS", "FAIL", "-   ", "PASS"]
    assert "before and after, differ by up to 0.01" in lines[3]


def test_routers_that_are_deaf_fail(start: Any) -> None:
    """The bias is masked and nothing reads it: the API says so, the counts do, and answers do not change."""
    server = start(debug_routes=True)
    for router, other in zip(server.engine.ranks[0].routers.routers, make_model().routers.routers, strict=True):
        object.__setattr__(router, "forward", other.forward)
    code, lines = cli(server)
    assert code == 1
    assert [line[:4] for line in lines] == ["FAIL", "FAIL", "FAIL", "PASS", "-   ", "PASS"]
    assert "found logits" in lines[0]
    assert "layer 0: pruned expert" in lines[1]
    assert "was selected" in lines[1]
    assert "log-probabilities by up to 0;" in lines[2]


@pytest.mark.parametrize(("tokens", "counts"), [(-1, 0), (0, 1), (0, -1)])
def test_selections_that_are_not_accounted_for_fail(start: Any, tokens: int, counts: int) -> None:
    server = start(debug_routes=True)
    model = server.engine.ranks[0]
    real = model.routes

    def routes(**arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = real(**arguments)
        found["tokens"][1] += tokens
        kept = next(expert for expert, count in enumerate(found["counts"][1]) if count) if any(found["counts"][1]) else 0
        found["counts"][1][kept] += counts + 2 * tokens
        return found

    model.routes = routes
    check = checks_of(server)["real traffic obeys"]
    assert check.passed is False
    assert check.detail.startswith("layer 1: ")


def test_a_refused_mask_fails_and_the_old_one_stays(start: Any, tmp_path: Path) -> None:
    server = start()
    server.engine.ranks[0].routers.apply(MASK)
    code, lines = cli(server, "--mask", saved(MASK.model_copy(update={"top_k": 1}), tmp_path / "m.json"))
    assert code == 1
    assert [line[:14] for line in lines] == ["FAIL completed", "PASS put back "]
    assert "top_k_is_fixed_at_launch" in lines[0]
    assert server.api.in_force == MASK


def test_a_mask_that_cannot_be_put_back_is_said_loudly(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.engine.ranks[0].routers.apply(MASK)
    # DELETE, PUT, DELETE, six for the speed, then three attempts.
    server.api.switches = [None] * 9 + [REFUSED, REFUSED]
    checks = checks_of(server)
    assert checks["put back"].passed  # the third attempt
    server.api.switches = [None] * 9 + [REFUSED] * 3
    checks = checks_of(server)
    assert checks["put back"].passed is False
    assert "WAS NOT PUT BACK" in checks["put back"].detail
    assert "refused" in checks["put back"].detail


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: a process that was started in the background ignores Ctrl-C, and its tests inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after", [1, 2, 5, 8])
def test_interrupted_it_puts_the_old_mask_back(start: Any, signal_number: int, after: int) -> None:
    """Wherever it is: among the log-probabilities or in the speed."""
    server = start()
    server.engine.ranks[0].routers.apply(MASK)
    server.engine.step_s = (0.02, 0.02)

    def interrupt() -> None:
        while len(server.api.asked) < after:
            time.sleep(0.002)
        os.kill(os.getpid(), signal_number)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    test = SelfTest(ServerClient(server.url, "right"), None, 2, 10)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt if signal_number == signal.SIGINT else SystemExit):
        test.run()
    thread.join()
    assert server.api.in_force == MASK
    assert (test.checks[-1].name, test.checks[-1].passed) == ("put back", True)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_a_server_that_dies_is_told_of(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    test = SelfTest(ServerClient(server.url, "right"), None, 2, 4)
    test._speed = lambda *_: server.__exit__()  # type: ignore[method-assign]
    assert not test.run()
    assert (test.checks[-1].name, test.checks[-1].passed) == ("put back", False)


def test_what_cannot_be_tested_is_refused_before_a_switch(start: Any, tmp_path: Path) -> None:
    server = start()
    for arguments, message in (
        (("--mask", saved(make_mask([None] * 3), tmp_path / "m.json")), "found a mask that prunes nothing"),
        (("--mask", tmp_path / "none.json"), "No such file"),
        (("--key", "wrong"), "401 unauthorized"),
        (("--token-ids", "9"), "expected e.g. 100-999"),
        (("--token-ids", "9-5"), "token_ids: found 9 to 6"),
        (("--tokens", "1"), "--tokens"),
    ):
        code, lines = cli(server, *arguments)
        assert (code, message in " ".join(lines)) == (2, True), lines
    assert server.api.asked == []


def test_an_engine_without_log_probabilities_fails(start: Any) -> None:
    server = start()
    server.engine.scored = lambda *_: {"id": "x", "choices": [{"text": ""}]}
    checks = checks_of(server)
    assert "no log-probabilities in its answer" in checks["completed"].detail
    assert checks["put back"].passed


def test_half_of_the_experts() -> None:
    status = make_model().status()
    mask = half_mask(status, 3)
    assert mask.num_kept == [EXPERTS // 2] * 3
    assert mask.model.fingerprint == status["fingerprint"]
    assert mask == half_mask(status, 3) != half_mask(status, 4)
    assert len({tuple(ids or ()) for ids in mask.keep}) > 1
    many = half_mask({**status, "model_top_k": 6, "top_k": 2}, 0)
    assert (many.num_kept, many.top_k) == ([6] * 3, None)
    with pytest.raises(InputError, match="chooses 8 of 8 experts"):
        half_mask({**status, "model_top_k": 8}, 0)


def test_scores_are_compared_as_far_as_the_contexts_agree() -> None:
    one = Scores([-1.0, -2.0], [("a", -0.5), ("b", -0.5), ("c", -0.5)])
    assert one.gap(one) == 0
    assert one.gap(Scores([-1.0, -2.25], one.answer)) == 0.25
    assert one.gap(Scores(one.prompt, [("a", -0.5), ("x", -0.75), ("c", -9.0)])) == 0.25
    assert one.gap(Scores(one.prompt, [("x", -0.5), ("y", -9.0), ("z", -9.0)])) == 0
    nan = Scores([float("nan"), -2.0], one.answer)
    assert nan.gap(nan) == one.gap(nan) == float("inf")
    low = Scores([float("-inf"), -2.0], one.answer)
    assert (low.gap(low), low.gap(one)) == (0, float("inf"))
    assert json.loads("[-Infinity]") == [low.prompt[0]]
