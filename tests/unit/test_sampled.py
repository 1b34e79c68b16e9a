"""Claim: what is sampled in whatever steps an engine takes adds up to what every token, taken by itself, was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from softprune.control import ControlError
from softprune.runtime.sample_slab import SLAB_ROWS, STEP_ROWS
from softprune.runtime.sampled_sums import SampledSums
from tests.unit.fake_control import LAYERS, TOP_K, make_launch, make_mask, make_model
from tests.unit.sampled_engine import Request, SampledEngine, one_thread, same  # noqa: F401 - a fixture of all tests here
from tests.unit.test_collector import api
from tests.unit.test_control_api import run

KEEP: list[list[int] | None] = [[0, 1, 2], None, [3, 4, 5, 6]]
CHAT = Request("chat", 0, 40, asked=True, completions=((5, 12), (20, 37)))
CODE = Request("code", 1, 9, asked=True)
PLAIN = Request("plain", 1, 25)
NONE = Request("none", 0, 6, asked=True, completions=())


def traffic(engine: SampledEngine, cut: int = 17) -> None:
    """Four requests, whose prompts come in chunks beside answers of others; the last answers' draws are thrown away."""
    engine.collector.tag_number("more")
    engine.step((CHAT, 0, cut), (CODE, 0, 9), padding=3)
    engine.step((CODE, 9, 1), (CHAT, cut, 40 - cut), (PLAIN, 0, 20))
    engine.step((CODE, 10, 1), (CHAT, 40, 1), (PLAIN, 20, 5), (NONE, 0, 6), padding=20)
    for i in range(1, 9):
        engine.step((NONE, 5 + i, 1), (CHAT, 40 + i, 1), (CODE, 10 + i, 1), captured=True, padding=5)
    engine.step((CODE, 19, 1), (PLAIN, 25, 1), surplus=(CODE,))


@pytest.mark.parametrize("attribution", ["predictor", "target"])
@pytest.mark.parametrize("says_before", [False, True])
def test_chunks_and_answers(says_before: bool, attribution: str, tmp_path: Path) -> None:
    """Each kind of a token's score by itself, at the row that the attribution names."""
    engine = SampledEngine(says_before=says_before, attribution=attribution)
    engine.step((CHAT, 0, 3), (PLAIN, 0, 3))  # before the start
    engine.start()
    traffic(engine)
    found = engine.file(tmp_path)
    same(found, engine.expected(2, attribution=attribution), "reap", "eaft.grid")
    kinds = [[kind for (name, _), (kind, _) in engine.scored.items() if name in names] for names in (("chat", "none"), ("code", "plain"))]
    assert found["eaft.hist"].sum((2, 3)).tolist() == [[kind.count(0), kind.count(1)] for kind in kinds]
    assert found["eaft.hist"].sum() == len(engine.scored)
    # 7 + 17 tokens of the completions, 8 that follow the first of CODE's prompt; PLAIN's prompt was not asked for.
    assert found["eaft.hist"].sum((2, 3))[:, 0].tolist() == [24, 8]
    log_p = np.array([scores[0] for kind, scores in engine.scored.values() if kind == 1], np.float64)
    assert found["eaft.nll_sum"][:, 1].sum() == pytest.approx(-log_p.sum(), rel=1e-5)
    assert found["eaft.p_sum"][:, 1].sum() == pytest.approx(np.exp(log_p).sum(), rel=1e-5)
    assert np.array_equal(found["reap.count"], found["router.count"].sum(1))
    assert (found.header.sampling, engine.collector.status()["lost_samples"]) == ({"reap": 1, "eaft": 1}, 0)
    assert found.header.eaft is not None
    assert found.header.eaft.attribution == attribution


@pytest.mark.parametrize("attribution", ["predictor", "target"])
def test_rows_of_large_steps_are_measured_within_their_layers(attribution: str, tmp_path: Path) -> None:
    """And give the sums that small steps do, to the bit; more rows than the slab holds go through it, too."""
    long, files = Request("long", 0, 5 * STEP_ROWS, asked=True), []
    for size, least in ((5 * STEP_ROWS, STEP_ROWS), (5 * STEP_ROWS, SLAB_ROWS), (2 * STEP_ROWS, STEP_ROWS), (2 * STEP_ROWS, SLAB_ROWS),
                        (STEP_ROWS, STEP_ROWS), (10, STEP_ROWS)):  # fmt: skip
        engine = SampledEngine(attribution=attribution)
        engine.sampler.within.least = least
        engine.start()
        for first in range(0, long.prompt, size):
            engine.step((long, first, min(size, long.prompt - first)))
        for i in range(3):
            engine.step((long, long.prompt + i, 1))
        same(engine.file(tmp_path), engine.expected(1, attribution=attribution), "reap", "eaft.grid")
        files.append(engine.file(tmp_path))
        assert engine.collector.status()["lost_samples"] == 0
    assert long.prompt > SLAB_ROWS
    for name in (name for name in files[0].tensors if name.startswith(("reap", "eaft"))):
        assert all(np.array_equal(files[0][name], other[name]) for other in files[1:]), name


def test_a_captured_step_of_more_rows_than_it_can_keep_says_what_was_lost(tmp_path: Path) -> None:
    engine = SampledEngine()
    engine.start()
    engine.collector.tag_number("last")
    for i in range(10):
        engine.step(*[(Request(f"r{row}", int(row >= SLAB_ROWS)), i, 1) for row in range(SLAB_ROWS + 6)], captured=True)
    found = engine.file(tmp_path)
    assert (found["reap.count"].sum((0, 2)) == 10 * SLAB_ROWS * TOP_K).all()
    assert (found["reap.count"][1].sum(-1) > 30 * TOP_K).all()  # the last rows are lost no more often than others
    assert (found["router.count"].sum((0, 1, 3)) == 10 * (SLAB_ROWS + 6) * TOP_K).all()
    assert engine.collector.status()["lost_samples"] == 60


def test_a_switch_keeps_masks_apart(tmp_path: Path) -> None:
    """Rows that still wait when a mask comes belong to the one before it; no row is counted with a score made under another."""
    engine = SampledEngine(attribution="target", shadow=True)
    mask = make_mask(KEEP, engine.model)
    engine.start()
    crossing = Request("crossing", 0, 12, asked=True)
    for number, (first, rows) in enumerate([(0, 5), (5, 7), (12, 1), (13, 1)]):
        if number:
            engine.scored.pop(("crossing", first))  # what the row at `first` would go with was predicted under another mask
            engine.switch(mask if number % 2 else None)
        engine.step((crossing, first, rows))
    unpruned, pruned = engine.file(tmp_path, "none"), engine.file(tmp_path, mask.hash)
    for found, its in ((unpruned, None), (pruned, mask.hash)):
        same(found, engine.expected(1, its, "target"), "reap", "eaft.grid", "router.shadow")
    assert unpruned["reap.count"].sum() + pruned["reap.count"].sum() == 14 * LAYERS * TOP_K
    for layer in range(LAYERS):
        assert not pruned["reap.count"][:, layer, mask.pruned(layer)].any()
    assert np.array_equal(unpruned["router.shadow_count"], unpruned["reap.count"])
    assert not np.array_equal(pruned["router.shadow_count"], pruned["reap.count"])
    assert engine.model.verified() is None  # the mask is in force again


@pytest.mark.parametrize("rows", [10, 2 * STEP_ROWS])
def test_shadow_counts_are_the_unmasked_routers(rows: int, tmp_path: Path) -> None:
    """Also in mode router, which measures nothing else; what asks the router leaves no trace in what is counted, nor in the routers."""
    engine = SampledEngine("reap", mode="router", shadow=True)
    mask = make_mask(KEEP, engine.model)
    engine.switch(mask)
    engine.start()
    engine.step((Request("a", 0, rows), 0, rows))
    found = engine.file(tmp_path)
    same(found, engine.expected(1, mask.hash), "router.shadow")
    assert found["router.shadow_count"][:, 0, mask.pruned(0)].sum() > 0
    assert found["router.count"].sum() == rows * LAYERS * TOP_K
    assert (found.header.modes, found.header.sampling) == (["router"], {"shadow": 1})
    assert "reap.count" not in found.tensors
    assert engine.model.verified() is None


def test_a_router_that_fails_unmasked_stays_masked() -> None:
    engine = SampledEngine()
    engine.switch(make_mask(KEEP, engine.model))
    forward, broken = engine.model.routers.routers[1].forward, torch.zeros(1, 3)
    with pytest.raises(RuntimeError), engine.model.routers.unmasked(0):
        forward(broken)
    assert engine.model.verified() is None


def test_stop_start_and_reset(tmp_path: Path) -> None:
    engine = SampledEngine()
    engine.start()
    engine.step((CHAT, 0, 20))
    engine.collector.call("stop")
    engine.step((CHAT, 20, 10))  # not collected
    engine.start()
    engine.step((CHAT, 30, 10))
    same(engine.file(tmp_path), engine.expected(1), "reap", "eaft.grid")
    engine.step((CHAT, 40, 1))
    engine.collector.call("reset")
    engine.rows.clear()
    engine.scored.clear()
    engine.step((PLAIN, 0, 25))
    engine.collector.tag_number("more")
    found = engine.file(tmp_path)
    same(found, engine.expected(2), "reap", "eaft.grid")
    assert found["eaft.hist"].sum() == 1
    engine.collector.call("stop")
    again = engine.file(tmp_path)
    assert all(np.array_equal(found[name], again[name]) for name in found.tensors)


def test_steps_that_fail_and_checks_between_steps_leave_no_trace(tmp_path: Path) -> None:
    engine = SampledEngine()
    engine.start()
    engine.step((CHAT, 0, 10))
    assert engine.model.verified() is None
    engine.step((CODE, 0, 9), fails=True)
    engine.step((CHAT, 10, 70 - 10), fails=True)  # these would have been sampled within their layers
    assert engine.model.verified() is None
    engine.step((CHAT, 10, 10))
    same(engine.file(tmp_path), engine.expected(1), "reap", "eaft.grid")
    assert engine.collector.status()["lost_samples"] == 9 + 60


def test_a_request_that_begins_again_is_not_given_the_score_of_before(tmp_path: Path) -> None:
    """Preempted, its tokens are computed again, all of them or from a cached one on: nothing predicted the first of them this time."""
    engine = SampledEngine(attribution="target")
    engine.start()
    engine.step((PLAIN, 0, 25))
    engine.step((PLAIN, 25, 1))
    engine.step((PLAIN, 10, 17))
    engine.collector.tag_number("more")
    found = engine.file(tmp_path)
    scored = engine.scored
    expected = engine.expected(2, attribution="target")
    assert found["reap.count"].sum() == (25 + 1 + 17) * LAYERS * TOP_K
    # Positions 25 and 26 were drawn; 25 is computed in two steps, and in the second one nothing scored what led to it.
    assert [position for _, position in scored] == [25, 26, 27]
    assert found["eaft.grid_count"].sum() == LAYERS * TOP_K
    assert expected["eaft.grid_count"].sum() > found["eaft.grid_count"].sum()


def test_one_in_sixteen(tmp_path: Path) -> None:
    """As many as there have to be, also of a batch that decodes in step with the windows; the plane has all tokens."""
    engine = SampledEngine(sample=16)
    engine.start()
    requests = [Request(f"r{i}", 0, 1) for i in range(16)]
    for i in range(40):
        engine.step(*[(request, i, 1) for request in requests])
    found = engine.file(tmp_path)
    assert (found["reap.count"].sum((0, 2)) == 40 * TOP_K).all()
    assert (found["eaft.grid_count"].sum((0, 1, 3, 4, 5)) == 40 * TOP_K).all()
    assert found["eaft.hist"].sum() == 640
    assert found.header.sampling == {"reap": 16, "eaft": 16}


def test_one_in_sixteen_of_long_prompts(tmp_path: Path) -> None:
    """Measured within layers, each by what it is."""
    engine = SampledEngine(sample=16)
    engine.start()
    long, size = Request("long", 0, 8 * 16 * STEP_ROWS, asked=True), 16 * STEP_ROWS
    for first in range(0, long.prompt, size):
        engine.step((long, first, size))
    found = engine.file(tmp_path)
    assert (found["reap.count"].sum((0, 2)) == long.prompt // 16 * TOP_K).all()
    assert found["eaft.hist"].sum() == long.prompt
    assert engine.collector.status()["lost_samples"] == 0
    expected = engine.expected(1)
    mean = {name: found["reap.norm_sum"].sum() / found["reap.count"].sum() for name, found in (("found", found), ("expected", expected))}
    assert mean["found"] == pytest.approx(mean["expected"], rel=0.05)


def test_nothing_grows() -> None:
    """With the steps of a long run, of a server that samples nothing and of one that samples."""
    for settings in ({"mode": "router"}, {"sample": 1000}, {"attribution": "target"}):
        engine = SampledEngine(**settings)  # type: ignore[arg-type]
        engine.start()
        sizes = []
        for i in range(2 * SLAB_ROWS):
            engine.sampler.begin(2)
            engine.sampler.launched()
            if i > SLAB_ROWS:
                sizes.append(sum(len(value) for value in vars(engine.sampler).values() if isinstance(value, list | dict)))
        assert max(sizes) <= SLAB_ROWS


def test_norms_that_are_not_finite_are_lost_and_poison_nothing(tmp_path: Path) -> None:
    engine = SampledEngine("reap")
    engine.start()
    scaled = engine.sampler.experts
    engine.sampler.experts = lambda layer, hidden, *chosen: torch.where(hidden[:, :1] > 0.5, torch.inf, scaled(layer, hidden, *chosen))
    engine.step((Request("a", 0, 50), 0, 50))
    found, lost = engine.file(tmp_path), engine.collector.status()["lost_samples"]
    assert 0 < lost < 50
    assert found["reap.count"].sum() == (50 - lost) * LAYERS * TOP_K


def test_starts_that_are_refused() -> None:
    router = make_model(make_launch(stats="router")).add_collector(64, "vLLM 0.32.0")
    engine = SampledEngine("reap")
    for collector, asked in (
        (router, {"mode": "reap"}), (router, {"mode": "eaft"}), (router, {"mode": "router", "shadow": True}),
        (engine.collector, {"mode": "eaft"}),
    ):  # fmt: skip
        with pytest.raises(ControlError) as error:
            collector.call("start", **asked)
        assert (error.value.status, error.value.kind) == (409, "mode_is_off")
    engine.start()
    engine.step((PLAIN, 0, 5))
    with pytest.raises(ControlError) as error:
        engine.collector.call("start", mode="router")
    assert (error.value.status, error.value.kind) == (409, "already_collecting")
    engine.collector.call("stop")
    # A start that samples nothing neither changes what the file says nor lets other sampling in.
    engine.collector.call("start", mode="router")
    engine.step((PLAIN, 5, 5))
    engine.collector.call("stop")
    for more in ({"sample": 2}, {"attribution": "target"}):
        with pytest.raises(ControlError) as error:
            engine.collector.call("start", **{"mode": "reap", "sample": 1, **more})
        assert (error.value.status, error.value.kind) == (409, "sampled_otherwise")
    assert not engine.collector.status()["collecting"]
    engine.collector.call("reset")
    engine.collector.call("start", mode="reap", sample=2)


def test_a_file_says_how_it_was_sampled(tmp_path: Path) -> None:
    engine = SampledEngine(sample=4, attribution="target")
    engine.start()
    engine.step((PLAIN, 0, 25))
    engine.collector.call("stop")
    engine.collector.call("start", mode="router")
    engine.step((PLAIN, 0, 25))
    engine.collector.tag_number("more")
    found = engine.file(tmp_path)
    assert found.header.sampling == {"reap": 4, "eaft": 4}
    assert found.header.eaft is not None
    assert found.header.eaft.attribution == "target"
    assert [sorted(run.sampled) for run in found.header.runs] == [["eaft", "reap"], []]
    assert (found["reap.count"].sum((0, 2)) // TOP_K).tolist() in ([6] * LAYERS, [7] * LAYERS)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b'"reap"', b"{", b'{"mode": "all"}', b'{"mode": null}', b'{"sample": 4}', b'{"mode": "reap", "sample": 0}',
        b'{"mode": "reap", "sample": -1}', b'{"mode": "reap", "sample": 1.5}', b'{"mode": "reap", "sample": "16"}',
        b'{"mode": "reap", "sample": true}', b'{"mode": "reap", "sample": 1000001}', b'{"mode": "reap", "sample": 1e400}',
        b'{"mode": "reap", "sample": NaN}', b'{"mode": "reap", "shadow": 1}', b'{"mode": "reap", "shadow": "yes"}',
        b'{"mode": "eaft", "attribution": "study"}', b'{"mode": "eaft", "attribution": ["target"]}', b'{"mode": "eaft", "tag": "chat"}',
        b'{"mode": "reap", "sample": ' + b"9" * 5000 + b"}", b"[" * 100_000, b"\xff\xfe",
    ],
)  # fmt: skip
def test_malformed_bodies_of_a_start(body: bytes) -> None:
    served = api(stats="eaft")
    answer = run(served, "POST", "stats/start", body)
    assert (answer.status, answer.kind) == (400, "invalid_mode")
    assert run(served, "GET", "status").json["statistics"]["collecting"] is False


def test_bodies_of_a_start() -> None:
    for body, sample in (({"mode": "router"}, None), ({"mode": "reap"}, 16), ({"mode": "eaft", "sample": 3, "attribution": "target"}, 3)):
        answer = run(api(stats="eaft"), "POST", "stats/start", json.dumps(body).encode())
        assert (answer.status, answer.json["mode"], answer.json["sample"]) == (200, body["mode"], sample)


@pytest.mark.parametrize("says_before", [False, True])
@pytest.mark.parametrize("where", ["_end_step", "_send"])
def test_statistics_that_fail_end_neither_a_switch_nor_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, says_before: bool
) -> None:
    """Serving goes on, under the mask that was asked for; nothing is collected or handed out before a reset, and then all is right."""
    engine, mask = SampledEngine(says_before=says_before), make_mask(KEEP)
    engine.start()
    traffic(engine)

    def fails() -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(engine.sampler, where, fails)
    engine.switch(mask)
    status = engine.model.status()
    assert (status["mask"]["hash"], status["statistics"]["collecting"]) == (mask.hash, False)
    assert "MemoryError: no room" in status["statistics"]["failed"]
    assert torch.isneginf(engine.model.routers.routers[0].bias[3:]).all()
    traffic(engine)
    for action, arguments in (("start", {"mode": "eaft"}), ("stop", {}), ("file", {"mask": "none"})):
        with pytest.raises(ControlError, match="no room") as error:
            engine.collector.call(action, **arguments)
        assert (error.value.status, error.value.kind) == (500, "statistics_failed")

    monkeypatch.undo()
    assert engine.collector.call("reset")["failed"] is None
    engine.rows.clear()
    engine.scored.clear()
    engine.start()
    traffic(engine)
    same(engine.file(tmp_path), engine.expected(2, mask.hash), "reap", "eaft.grid")

    monkeypatch.setattr(engine.sampler, "_end_step", fails)
    traffic(engine)
    assert engine.collector.status()["failed"] == "sampling of a step: MemoryError: no room"


def test_sums_that_fail_on_their_thread_end_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SampledEngine("reap")
    engine.start()
    engine.step((PLAIN, 0, 9))

    def fails(self: SampledSums, *args: object) -> int:
        raise MemoryError("no room")

    monkeypatch.setattr(SampledSums, "add_rows", fails)
    engine.switch(make_mask(KEEP))
    for i in range(3):
        engine.step((PLAIN, 9 + i, 1))
        engine.switch(None)
    assert engine.collector.status()["failed"] == "keeping what was counted under the mask before: MemoryError: no room"
    with pytest.raises(ControlError, match="no room"):
        engine.file(Path())
