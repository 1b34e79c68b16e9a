"""The control API as an ASGI middleware, without a server around it: who is let in, what is refused, and that refusals change nothing."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from softprune.control import KEY_HEADER, PREFIX, ControlError
from softprune.control_api import CALLS, ControlApi, check_served
from softprune.errors import RefusedError
from softprune.mask import MAX_BYTES, ExpertMask
from softprune.mask_state import read_state
from tests.unit.fake_control import REFUSED, FakeControl, FakeEngine, make_launch, make_mask

KEEP: list[list[int] | None] = [[0, 1, 2], None, [3, 4, 5, 6]]
OTHER: list[list[int] | None] = [[4, 5], [0, 1, 2, 3], None]


@dataclass
class Answer:
    """What came back; `status` is None if nothing did. `received`: messages of the body that were read."""

    status: int | None = None
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    received: int = 0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        return str(self.json["error"]["type"])


async def call(
    api: ControlApi, method: str, path: str, body: bytes | Iterable[bytes] = b"", key: str | None = "right", *, length: bytes | None = None,
    hang_up: bool = False, full_path: bool = False, root: str = "", query: str = "",
) -> Answer:  # fmt: skip
    """One call, in-process; a body that is no `bytes` comes in these chunks and without a length."""
    headers = [(b"host", b"x")]
    if key is not None:
        headers.append((KEY_HEADER.lower().encode(), key.encode()))
    if length is None and isinstance(body, bytes):
        length = str(len(body)).encode()
    if length is not None:
        headers.append((b"content-length", length))
    chunks: Iterator[bytes] = iter([body] if isinstance(body, bytes) else body)
    answer = Answer()
    state = {"next": next(chunks, b"")}

    async def receive() -> dict[str, Any]:
        answer.received += 1
        if hang_up and answer.received > 1:
            return {"type": "http.disconnect"}
        now = state["next"]
        following = next(chunks, None)
        state["next"] = following or b""
        return {"type": "http.request", "body": now, "more_body": following is not None or hang_up}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert answer.status is None
            answer.status, answer.headers = message["status"], dict(message["headers"])
        else:
            answer.body += message.get("body", b"")

    path = path if full_path else f"{PREFIX}/{path}"
    path, _, question = path.partition("?")
    scope = {
        "type": "http", "method": method, "path": root + path, "root_path": root, "query_string": (query or question).encode(),
        "headers": headers,
    }  # fmt: skip
    await api(scope, receive, send)
    if answer.status is not None:
        assert int(answer.headers[b"content-length"]) == len(answer.body)
    return answer


def run(api: ControlApi, method: str, path: str, *args: Any, **kwargs: Any) -> Answer:
    return asyncio.run(call(api, method, path, *args, **kwargs))


def fake(key: str | None = "right", ranks: int = 1, **launch: Any) -> FakeControl:
    return FakeControl(FakeEngine(ranks=ranks, launch=make_launch(**launch)), key)


def body_of(rows: list[list[int] | None], **changes: Any) -> bytes:
    return json.dumps({**json.loads(make_mask(rows).dump()), **changes}).encode()


def biases(api: FakeControl) -> list[list[float]]:
    return [router.bias.tolist() for model in api.engine.ranks for router in model.routers.routers]


@contextmanager
def unchanged(api: FakeControl) -> Iterator[None]:
    """Nothing that the API answers or the routers hold changes."""
    before = biases(api), api.in_force, api.engine.epochs.current
    yield
    assert (biases(api), api.in_force, api.engine.epochs.current) == before


@pytest.mark.parametrize("key", [None, "wrong", "", "righ", "right ", "rightt", "RIGHT", "ríght"])
@pytest.mark.parametrize("entry", [*CALLS, "GET nothing", "OPTIONS mask", "HEAD status", "POST mask", "GET "])
def test_nothing_without_the_key(entry: str, key: str | None) -> None:
    method, path = entry.replace("{id}", "cmpl-1").split(" ")
    api = fake(debug_routes=True)
    with unchanged(api):
        answer = run(api, method, path, body_of(KEEP), key)
    assert (answer.status, answer.kind, answer.received) == (401, "unauthorized", 0)
    assert api.engine.seen == api.asked == []


@pytest.mark.parametrize("entry", CALLS)
@pytest.mark.parametrize("key", [None, "", "None", "null"])
def test_nothing_before_there_is_a_key(entry: str, key: str | None) -> None:
    method, path = entry.replace("{id}", "cmpl-1").split(" ")
    assert run(fake(key=None), method, path, body_of(KEEP), key).status == 401


@pytest.mark.parametrize("key", ["right", "wrong"])
@pytest.mark.parametrize(
    "path", [PREFIX, f"{PREFIX}/", f"{PREFIX}/status", f"{PREFIX}/mask/", f"{PREFIX}/../v1/completions", f"{PREFIX}//", f"{PREFIX}/a/b?c=d"]
)
@pytest.mark.parametrize("root", ["", "/proxied"])
def test_the_app_never_sees_a_path_under_the_prefix(path: str, key: str, root: str) -> None:
    api = fake()
    for method in ("GET", "PUT", "POST", "DELETE", "OPTIONS", "PATCH"):
        answer = run(api, method, path, body_of(KEEP), key, full_path=True, root=root)
        assert answer.status in ((401,) if key == "wrong" else (200, 404))
    assert api.engine.seen == []


def test_all_else_passes() -> None:
    api = fake()
    for path in ("/", "/v1/files", "/softprune", "/softprune/v10/status", "/x/softprune/v1/status"):
        assert run(api, "GET", path, full_path=True, key=None).status == 404
        assert api.engine.seen.pop() == path


def test_a_switch_and_back() -> None:
    api = fake(ranks=2)
    loaded = biases(api)
    mask = make_mask(KEEP)
    answer = run(api, "PUT", "mask", body_of(KEEP))
    assert (answer.status, answer.headers[b"content-type"]) == (200, b"application/json")
    assert {**answer.json, "ms": None} == {
        "epoch": 1, "ms": None, "in_flight": "continue", "mask": {"hash": mask.hash, "num_kept": [3, 8, 4]},
    }  # fmt: skip
    assert 0 < answer.json["ms"] < 5000
    assert sum(bias == float("-inf") for row in biases(api) for bias in row) == 2 * (5 + 0 + 4)
    assert ExpertMask.parse(run(api, "GET", "mask").json["mask"], "answer") == mask
    status = run(api, "GET", "status").json
    assert status["mask"] == {"hash": mask.hash, "num_kept": [3, 8, 4]}
    assert {name: status[name] for name in ("engine", "model", "mask_epoch", "crossed_requests", "launch_mask", "top_k")} == {
        "engine": "vLLM 0.32.0", "model": "/data/models/fake", "mask_epoch": 1, "crossed_requests": 0, "launch_mask": None, "top_k": 2,
    }  # fmt: skip
    assert run(api, "POST", "verify").json == {"obeyed": True, "detail": None}
    back = run(api, "DELETE", "mask?in_flight=drain").json
    assert (back["epoch"], back["mask"], back["in_flight"]) == (2, None, "drain")
    assert [in_flight for _, in_flight in api.asked] == ["continue", "drain"]
    assert run(api, "GET", "mask").json == {"mask": None}
    assert biases(api) == loaded


def test_verify_names_what_does_not_obey() -> None:
    api = fake(ranks=2)
    run(api, "PUT", "mask", body_of(KEEP))
    api.engine.ranks[1].routers.routers[2].bias[0] = 0.5  # pruned
    answer = run(api, "POST", "verify")
    assert answer.status == 200
    assert answer.json["obeyed"] is False
    assert "layer 2: found logits" in answer.json["detail"]


def test_processes_that_disagree_are_told_of() -> None:
    api = fake(ranks=2)
    api.engine.ranks[1].routers.apply(make_mask(KEEP))
    for path in ("status", "mask"):
        answer = run(api, "GET", path)
        assert (answer.status, answer.kind) == (500, "ranks_disagree")


def test_requests_can_be_asked_for() -> None:
    api = fake()
    api.engine.epochs.stamp(["cmpl-1", "with/slash %25"], 3)
    assert run(api, "GET", "requests/cmpl-1").json["epochs"] == [0]
    assert run(api, "GET", "requests/with/slash %2525").json["epochs"] == [0]
    for path in ("requests/cmpl-2", "requests/", "requests"):
        answer = run(api, "GET", path)
        assert (answer.status, answer.kind) == (404, "not_found")


def test_routes_only_with_the_probe() -> None:
    api = fake()
    for method in ("GET", "DELETE"):
        answer = run(api, method, "routes")
        assert (answer.status, answer.kind) == (409, "probe_is_off")
    api = fake(debug_routes=True)
    api.engine.run([1, 2, 3])
    assert "ids" not in run(api, "GET", "routes").json
    assert [len(rows) for rows in run(api, "GET", "routes?trace=1").json["ids"]] == [3, 3, 3]
    assert run(api, "DELETE", "routes").json["tokens"] == [3, 3, 3]
    assert run(api, "GET", "routes").json["tokens"] == [0, 0, 0]


@pytest.mark.parametrize("length", [str(MAX_BYTES + 1), "9" * 30, "9" * 5000, "-1", "abc", ""])
def test_a_length_that_is_too_large_is_refused_before_a_byte_is_read(length: str) -> None:
    api = fake()
    answer = run(api, "PUT", "mask", b"{}", length=length.encode())
    assert (answer.status, answer.kind, answer.received) == (413, "body_too_large", 0)


def test_a_body_without_a_length_is_read_to_the_limit_only() -> None:
    """Of 100 MB in chunks no more is taken than shows that it is too large; and a length that is too small saves nothing."""
    chunk = b" " * 1_000_000
    for length in (None, b"2"):
        api = fake()
        answer = run(api, "PUT", "mask", (chunk for _ in range(100)), length=length)
        assert (answer.status, answer.kind, answer.received) == (413, "body_too_large", 17)
    # One that just fits is read whole, however it is cut.
    api, mask = fake(), body_of(KEEP)
    fits = mask + b" " * (MAX_BYTES - len(mask))
    assert run(api, "PUT", "mask", (fits[i : i + 1_000_000] for i in range(0, MAX_BYTES, 1_000_000))).status == 200
    assert run(api, "PUT", "mask", [*(bytes([byte]) for byte in mask)]).status == 200


def test_a_client_that_hangs_up_changes_nothing() -> None:
    api, mask = fake(), body_of(KEEP)
    for sent in (b"", mask[:50], mask):
        with unchanged(api):
            answer = run(api, "PUT", "mask", sent, length=str(len(mask)).encode(), hang_up=True)
        assert (answer.status, api.asked) == (None, [])


@pytest.mark.parametrize("query", ["in_flight=stop", "in_flight=", "in_flight", "in_flight=drain&in_flight=x", "in_flight=DRAIN"])
def test_in_flight_is_checked(query: str) -> None:
    api = fake()
    for method in ("PUT", "DELETE"):
        with unchanged(api):
            answer = run(api, method, "mask", body_of(KEEP), query=query)
        assert (answer.status, answer.kind) == (400, "invalid_in_flight")
    assert api.asked == []


def test_top_k_is_fixed_at_launch() -> None:
    api = fake()
    for top_k in (1, [2, 1, 2], [1, 1, 1]):
        with unchanged(api):
            answer = run(api, "PUT", "mask", body_of(KEEP, top_k=top_k))
        assert (answer.status, answer.kind) == (409, "top_k_is_fixed_at_launch")
        assert answer.json["error"]["detail"] == {"found": 1, "expected": 2}
    for good in (None, 2, [2, 2, 2]):
        assert run(api, "PUT", "mask", body_of(KEEP, top_k=good)).status == 200


def test_a_refusal_says_what_and_where() -> None:
    api = fake()
    error = run(api, "PUT", "mask", body_of(KEEP, keep=[[0, 0], None, None])).json["error"]
    assert (error["type"], error["detail"]["field"]) == ("invalid_mask", "keep[0]")
    assert error["message"] == "request body: keep[0]: found expert id 0 more than once; expected each id once"
    other = {"architecture": "GptOssForCausalLM", "num_layers": 3, "num_experts": 9, "top_k": 2}
    error = run(api, "PUT", "mask", body_of(KEEP, model=other)).json["error"]
    assert error["message"] == "request body: model.num_experts: found 9; expected 8, as the model has"
    stranger = {**other, "num_experts": 8, "fingerprint": "sha256:" + "0" * 64}
    with unchanged(api):
        assert run(api, "PUT", "mask", body_of(KEEP, model=stranger)).kind == "invalid_mask"
    assert run(fake(expert_mask_force=True), "PUT", "mask", body_of(KEEP, model=stranger)).status == 200


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [(REFUSED, 409, "refused"), (RefusedError("x"), 409, "refused"), (ControlError(409, "drain_timed_out", "x"), 409, "drain_timed_out"),
     (ValueError("x"), 500, "failed")],
)  # fmt: skip
def test_what_an_engine_raises_is_answered(error: Exception, status: int, kind: str) -> None:
    api = fake()
    api.switches = [error]
    with unchanged(api):
        answer = run(api, "PUT", "mask", body_of(KEEP))
    assert (answer.status, answer.kind) == (status, kind)
    assert run(api, "PUT", "mask", body_of(KEEP)).status == 200  # the next one is not locked out


def fuzzed(number: int, rng: random.Random) -> bytes:
    """A mutation of a valid mask."""
    valid = body_of(rng.choice([KEEP, OTHER]), top_k=rng.choice([None, 2]), provenance={"method": "x", "list": [1, {"a": None}]})
    document = json.loads(valid)
    mild = [None, 1, 2, [2, 1, 2], [2, 2, 2], [0, 1], [3, 4, 5], {}, {"a": [1, {}]}]
    wild = [
        True, False, 0, -1, 1.0, 0.5, 2**63, 10**400, "1", "", "\ud800", [], [[]], float("nan"), float("inf"), float("-inf"), [None] * 3,
        [[0, 1]] * 3, "x" * 1_000, list(range(8)), [[True, False]] * 3, [["0", "1"]] * 3, [0, 1, 10**20], "sha256:" + "a" * 64, 10_001,
    ]  # fmt: skip
    values = rng.choice([mild, wild])
    match number % 8:
        case 0:
            return valid[: rng.randrange(len(valid))]
        case 1:
            at = rng.randrange(len(valid))
            return valid[:at] + rng.randbytes(rng.randint(1, 8)) + valid[at + rng.randrange(8) :]
        case 2:
            return rng.randbytes(rng.randrange(200))
        case 3:
            return body_of(KEEP, **{rng.choice([*document, "more", "top_k", "top_k", "top_k"]): rng.choice(values)})
        case 4:
            model = {**document["model"], rng.choice([*document["model"], "x"]): rng.choice(values)}
            return json.dumps({**document, "model": model}).encode()
        case 5:
            document["keep"][rng.randrange(3)] = rng.choice(values)
            return json.dumps(document).encode()
        case 6:
            depth = rng.randrange(1, 2000)
            nested = rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth, "[" * 100_000])
            return json.dumps({**document, rng.choice([*document]): "@"}).replace('"@"', nested).encode()
        case _:
            odd = rng.choice(["1e999", "-0", "1" * 4000, "1" * 5000, '"\\ud800"', "NaN", '{"a":1,"a":2}', "0x1", "'a'", "[0,1,]", '"\0"'])
            return json.dumps({**document, rng.choice([*document]): "@"}).replace('"@"', odd).encode()


def test_a_thousand_broken_masks() -> None:
    """Each is 400 or 409 and changes nothing, or is a mask after all and then in force; never 500, and what is answered is JSON."""
    rng = random.Random(17)
    counts: dict[int | None, int] = {}

    async def fuzz() -> None:
        api = fake()
        for number in range(1000):
            body = fuzzed(number, rng)
            before = biases(api), api.in_force, api.engine.epochs.current
            answer = await call(api, "PUT", "mask", body)
            counts[answer.status] = counts.get(answer.status, 0) + 1
            assert answer.status in (200, 400, 409), (number, body[:300], answer.body[:300])
            json.dumps(answer.json, allow_nan=False)
            if answer.status == 200:
                assert api.in_force == ExpertMask.parse(json.loads(body), "body")
                assert api.engine.epochs.current == before[2] + 1
                assert (await call(api, "GET", "mask")).status == (await call(api, "GET", "status")).status == 200
            else:
                assert answer.json["error"]["message"]
                assert len(answer.body) < 20_000
                assert (biases(api), api.in_force, api.engine.epochs.current) == before

    asyncio.run(fuzz())
    print(f"\n{counts}")
    assert sum(counts.values()) == 1000
    assert set(counts) == {200, 400, 409}


def test_no_depth_of_nesting_is_an_error_of_ours() -> None:
    """Around Python's own limit, a body that was decoded may be too deep to be encoded again, or decoded in another process."""

    async def probe() -> set[int | None]:
        api, statuses = fake(), set()
        for depth in [1, 10, 50, *range(100, 1200, 1), 5000]:
            body = body_of(KEEP, provenance="@").replace(b'"@"', b'{"a":' + b"[" * depth + b"]" * depth + b"}")
            answer = await call(api, "PUT", "mask", body)
            statuses.add(answer.status)
            if answer.status == 200:
                statuses.add((await call(api, "GET", "mask")).status)
        return statuses

    assert sys.getrecursionlimit() == 1000
    assert asyncio.run(probe()) == {200, 400}


def test_two_switches_at_once_are_done_one_after_the_other() -> None:
    async def both() -> list[Answer]:
        api = fake()
        api.switches = [0.05] * 8
        bodies = [body_of(KEEP), body_of(OTHER)] * 4
        answers = await asyncio.gather(*(call(api, "PUT", "mask", body) for body in bodies))
        assert api.in_force == make_mask(OTHER)
        return list(answers)

    answers = asyncio.run(both())  # FakeControl.switch asserts that it is alone
    assert [answer.status for answer in answers] == [200] * 8
    assert sorted(answer.json["epoch"] for answer in answers) == list(range(1, 9))


@pytest.mark.parametrize("with_state", [True, False])
def test_a_switch_whose_client_is_gone_is_finished(tmp_path: Path, with_state: bool) -> None:
    state = tmp_path / "state.json"

    async def leave() -> FakeControl:
        api = fake(expert_mask_state=str(state) if with_state else None)
        api.switches = [0.05, 0.05]
        tasks = [asyncio.create_task(call(api, "PUT", "mask", body_of(keep))) for keep in (OTHER, KEEP)]
        while not api.asked:
            await asyncio.sleep(0)
        for task in tasks:  # one is under way, one waits for its turn
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        answer = await call(api, "DELETE", "mask?in_flight=drain")  # waits for both
        assert answer.json["epoch"] == 3
        assert len(api.asked) == 3
        return api

    assert asyncio.run(leave()).engine.epochs.masks == [None, make_mask(OTHER).hash, make_mask(KEEP).hash, None]
    assert state.exists() == with_state
    if with_state:
        assert read_state(str(state)).mask is None


def test_the_state_file_follows_switches_that_succeeded(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    api = fake(expert_mask_state=str(state))
    status = run(api, "GET", "status").json
    assert (status["state_file"], status["after_restart"]) == (str(state), "the mask in force")
    assert run(fake(), "GET", "status").json["after_restart"] == "the launch mask"
    api.switches = [REFUSED]
    assert run(api, "PUT", "mask", body_of(KEEP)).status == 409
    assert run(api, "PUT", "mask", body_of(KEEP, top_k=1)).status == 409
    assert list(tmp_path.iterdir()) == []
    assert run(api, "PUT", "mask", body_of(KEEP)).status == 200
    assert read_state(str(state)).mask == make_mask(KEEP)
    assert run(api, "PUT", "mask", b"{").status == 400
    api.switches = [ValueError("x")]
    assert run(api, "DELETE", "mask").status == 500
    assert read_state(str(state)).mask == make_mask(KEEP)
    assert run(api, "DELETE", "mask").status == 200
    assert read_state(str(state)).mask is None
    assert list(tmp_path.iterdir()) == [state]


def test_a_state_file_that_cannot_be_written_leaves_the_old_mask(tmp_path: Path) -> None:
    api = fake(expert_mask_state=str(tmp_path / "gone" / "state.json"))
    for method in ("PUT", "DELETE"):
        with unchanged(api):
            answer = run(api, method, "mask", body_of(KEEP))
        assert (answer.status, answer.kind) == (500, "failed")
        assert "No such file" in answer.json["error"]["message"]
    assert api.asked == []


def test_a_state_file_that_fails_after_the_switch_is_told_of(tmp_path: Path) -> None:
    """Nothing can take the switch back then, so the answer has to say that it was done."""
    api = fake(expert_mask_state=str(tmp_path / "state.json"))
    (tmp_path / "state.json").mkdir()
    answer = run(api, "PUT", "mask", body_of(KEEP))
    assert (answer.status, answer.kind) == (500, "state_not_written")
    assert "mask epoch 1 is in force" in answer.json["error"]["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_answers_name_their_epochs() -> None:
    api = fake()
    api.finished.add("cmpl-1", [0, 1])
    request = json.dumps({"prompt": [100, 101], "max_tokens": 2}).encode()
    answer = run(api, "POST", "/v1/completions", request, full_path=True, key=None)
    assert answer.json["softprune"] == {"epochs": [0, 1]}
    native = json.dumps({"input_ids": [100, 101], "sampling_params": {"max_new_tokens": 2}}).encode()
    api.finished.add("a1", [2])
    answer = run(api, "POST", "/generate", native, full_path=True, key=None, root="/proxied")
    assert answer.status == 404  # the fake engine does not know its root path; what matters is that the call reached it
    assert run(api, "POST", "/generate", native, full_path=True).json["meta_info"]["softprune"] == {"epochs": [2]}


def test_metrics_count_switches() -> None:
    from prometheus_client import REGISTRY

    def counted(result: str) -> float:
        return REGISTRY.get_sample_value("softprune:mask_switches_total", {"result": result}) or 0.0

    api = fake()
    done, refused = counted("done"), counted("refused")
    run(api, "PUT", "mask", body_of(KEEP))
    assert (counted("done"), counted("refused")) == (done + 1, refused)
    assert REGISTRY.get_sample_value("softprune:mask_epoch") == 1
    assert [REGISTRY.get_sample_value("softprune:kept_experts", {"layer": str(layer)}) for layer in range(3)] == [3, 8, 4]
    run(api, "PUT", "mask", body_of(KEEP, top_k=1))
    assert (counted("done"), counted("refused")) == (done + 1, refused + 1)
    run(api, "DELETE", "mask")
    assert REGISTRY.get_sample_value("softprune:kept_experts", {"layer": "2"}) == 8


def test_a_process_that_serves_something_else_is_refused() -> None:
    launch, model = make_launch(), fake().engine.ranks[0]
    check_served(launch, 0, model.status())
    for status in (None, "no such call", {}, {**model.status(), "top_k": 1}, {**model.status(), "mask": {"hash": "sha256:ab"}}):
        with pytest.raises(RefusedError, match="process 1: serves mask"):
            check_served(launch, 1, status)


def test_everything_listed_is_answered() -> None:
    api = fake(debug_routes=True, stats="router")
    api.engine.epochs.stamp(["cmpl-1"], 1)
    for entry in CALLS:
        method, path = entry.replace("{id}", "cmpl-1").split(" ")
        body = b'{"mode": "router"}' if path == "stats/start" else body_of(KEEP)
        if entry == "GET stats":
            run(api, "POST", "stats/start", b'{"mode": "router"}')
        assert run(api, method, path, body).status == 200, entry
    missing = run(api, "GET", "nothing")
    assert missing.status == 404
    assert all(entry in missing.json["error"]["message"] for entry in CALLS)
