"""GPU plans hold what they are to hold, in order; runs keep to their time, go on where they were, and compare only what ran together."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from softprune.bench import headline
from softprune.bench.gpu import headroom, launchers, matrix, session
from softprune.bench.gpu.__main__ import app
from softprune.bench.gpu.figures import compared, write_figures
from softprune.bench.gpu.headroom import Headroom, Shape
from softprune.bench.gpu.launchers import Sglang, Vllm, VllmCpu
from softprune.bench.gpu.matrix import Matrix
from softprune.bench.gpu.plan import PLANS, REWRITTEN, VARIANTS, Phase, Served, Variant, rounds
from softprune.bench.gpu.prepare import prepare
from softprune.bench.gpu.run_file import facts_of
from softprune.bench.gpu.session import Budget, Store, alone, stop_leftovers
from softprune.bench.masks import random_mask
from softprune.bench.max_batch import Try
from softprune.bench.report_read import read_rows
from softprune.bench.server import ServerError
from softprune.bench.tiny.weights import TRAINED
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.errors import CheckpointError, InputError
from tests.unit.fake_server import Behaviour, FakeServer

ENGINES = ("sglang", "vllm")
SGLANG = {(1, 512), (8, 512), (64, 512), (256, 512), (32, 2048), (128, 2048)}


@pytest.mark.parametrize("name", PLANS)
def test_plans_fit_their_servers(name: str) -> None:
    rows = [row for phase in PLANS[name]() for row in phase.rows]
    assert len({row.name for row in rows}) == len(rows)
    for phase in PLANS[name]():
        assert all(row.kv_tokens <= phase.kv_tokens for row in phase.rows)
        assert all(row.batch <= phase.max_batch for row in phase.rows)
        # Weights of 13.8 GB or less, 44 KB (49 KB in vLLM) for each token, and 3.5 GB for graphs and the rest of a server.
        weights = sum(13.8 if one.keep is None else 13.8 * one.keep / 32 + 1.5 for one in phase.servers)
        assert weights + len(phase.servers) * (phase.kv_tokens * 49_152 / 1e9 + 3.5) < 78
        first = [row for row in phase.rows if row.round == phase.rows[0].round and row.batch == phase.rows[0].batch]
        assert phase.boot_s + sum(row.seconds for row in first) < 400


def test_the_matrix_in_sglang() -> None:
    found = Counter((row.variant, row.batch, row.max_new_tokens) for phase in PLANS["sglang"]() for row in phase.rows)
    for variant in VARIANTS:
        if variant.endswith("_started"):
            continue
        assert {(batch, new) for one, batch, new in found if one == variant and new < 8192} == SGLANG
        assert found[variant, 32, 2048] >= 3
    assert {one for one, _, new in found if new == 8192} == {"unmasked", "keep16", "top2"}
    first = PLANS["sglang"]()[0].rows[:15]
    assert {row.variant for row in first} == {"unmasked", "keep24", "keep16", "keep24_rewritten", "keep16_rewritten"}
    assert {(row.batch, row.max_new_tokens) for row in first} == {(32, 2048)}


def test_the_matrix_in_vllm() -> None:
    found = Counter((row.variant, row.batch, row.max_new_tokens) for phase in PLANS["vllm"]() for row in phase.rows)
    assert set(found) == {(one, batch, 2048) for one in ("unmasked", "keep24", "keep24_rewritten", "top2") for batch in (32, 128)}
    assert all(found[one, 32, 2048] == 3 for one, _, _ in found)


def test_the_matrices_of_servers_that_start_with_their_mask() -> None:
    found = {
        engine: Counter((row.variant, row.batch) for phase in PLANS[engine + "_started"]() for row in phase.rows) for engine in ENGINES
    }
    of_sglang = {"keep24_started": 3, "keep24_rewritten": 3, "keep16_started": 6, "keep16_rewritten": 3, "keep16": 3}
    assert found["sglang"] == {(one, batch): number for one, number in of_sglang.items() for batch in (64, 128)}
    of_vllm = {"keep24_started": 6, "keep24_rewritten": 3, "keep24": 3, "keep16_started": 3, "keep16_rewritten": 3}
    assert found["vllm"] == {(one, 128): number for one, number in of_vllm.items()}
    for engine in ENGINES:
        of_matrix, started = ({row.name for phase in PLANS[name]() for row in phase.rows} for name in (engine, engine + "_started"))
        assert not of_matrix & started, "they may lie in one folder"
    for engine in (Sglang(), Vllm()):
        command = engine.command_of(VARIANTS["keep24_started"].server, Path("work"), 1, 4096, 128)
        assert command[command.index("--expert-mask") + 1] == "work/keep24.json"
        assert "work/base" in command
        assert "--expert-mask" not in engine.command_of(VARIANTS["keep24"].server, Path("work"), 1, 4096, 128)


def test_rounds_go_forwards_and_backwards() -> None:
    rows = rounds("vllm", "x", ("a", "b"), 32, 2048, {"a": 4}, repeats=3)
    assert [(row.variant, row.repeat) for row in rows] == [("a", 4), ("b", 1), ("b", 2), ("a", 5), ("a", 6), ("b", 3)]
    assert [row.round for row in rows] == ["x 1", "x 1", "x 2", "x 2", "x 3", "x 3"]


def test_headroom_plan() -> None:
    run = Headroom(Sglang(), Shape(), Path(), Store(Path("none")), Budget(0))
    assert list(run.rows)[:5] == [*(f"memory.{one}" for one in VARIANTS_OF_HEADROOM), "max_batch.16gib.unmasked", "max_batch.16gib.keep16"]
    assert len(run.rows) == 9
    memory = {"weights_gib": 12.8, "graphs_gib": 1.2, "kv_gib": 4.944, "kv_tokens": 120_000}
    assert Shape().room(16, memory) == pytest.approx(1.0 * 120_000 / 4.944, abs=2)
    assert Shape().room(14, memory) == 0


VARIANTS_OF_HEADROOM = ("unmasked", "keep16", "keep24")


def test_budget() -> None:
    budget = Budget(100 + session.STOPPING_S)
    assert budget.fits(80)
    assert not budget.fits(90)
    assert not budget.fits(50, fixed_s=50)
    budget.took(10, 20)
    assert budget.pace == 2
    assert not budget.fits(45)
    budget.took(10, 5)
    budget.took(10, 5)
    assert budget.pace == 1


def test_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.open(resume=False)
    store.failed("a", ServerError("no"))
    assert store.names == set()
    store.keep("a", {"x": 1})
    (tmp_path / "out" / ".b.json.half").write_text("{")
    assert store.documents() == {"a": {"x": 1}}
    assert [path.name for path in (tmp_path / "out").glob("*.error")] == []
    with pytest.raises(InputError, match="1 rows of an earlier run; expected an empty folder, or --resume"):
        store.open(resume=False)
    store.open(resume=True)


@pytest.mark.parametrize("shared", ["work", "out"])
@pytest.mark.parametrize("command", [["vllm", "--preset", "tiny"], ["headroom"]])
def test_a_folder_has_one_run_at_a_time(tmp_path: Path, shared: str, command: list[str]) -> None:
    """It would end the other's servers."""
    arguments = [command[0], str(tmp_path / "work"), str(tmp_path / "out"), *command[1:], "--limit-s", "0"]
    with alone(tmp_path / shared):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, InputError), result.output
        assert f"{shared}: found another run at work in it" in str(result.exception)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def test_servers_of_a_killed_run_are_ended_and_no_others(tmp_path: Path) -> None:
    own, other = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", folder], start_new_session=True)
        for folder in (str(tmp_path / "base"), "/elsewhere")
    )
    try:
        time.sleep(0.3)
        (tmp_path / session.PIDS).write_text(json.dumps([own.pid, other.pid, 2**22 + 1]))
        stop_leftovers(tmp_path)
        assert own.wait(5) == -9
        assert other.poll() is None
    finally:
        own.kill()
        other.kill()
    (tmp_path / session.PIDS).write_text("{")
    stop_leftovers(tmp_path)


FACTS = {"gpu": "G", "engine": "vllm", "engine_version": "1", "preset": "tiny", "fingerprint": "sha256:a", "softprune_version": "0"}


def test_rows_of_other_runs_are_refused(tmp_path: Path) -> None:
    """Before anything is measured; only a first row says with what the folder's rows are measured."""
    store = Store(tmp_path)
    store.open(resume=True)
    store.measured_with({**FACTS, "gpu": "H"})
    store.measured_with(FACTS)
    store.keep("a", {"x": 1})
    assert json.loads((tmp_path / "run.json").read_text()) == {"format": "softprune.gpu-run", "version": 1, **FACTS}
    assert (store.names, store.documents()) == ({"a"}, {"a": {"x": 1}})
    again = Store(tmp_path)
    again.measured_with(FACTS)
    for field in FACTS:
        with pytest.raises(InputError, match=f"run.json: {field}: found .*; expected 'other', as it is now"):
            again.measured_with({**FACTS, field: "other"})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: found Expecting"):
        again.measured_with(FACTS)
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match=r"run\.json: found no such file beside rows"):
        again.measured_with(FACTS)


def test_checkpoints_of_other_shapes_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path, ["rewritten24"], "tiny")
    prepare(tmp_path, ["rewritten24"], "tiny")
    assert facts_of(VllmCpu(), tmp_path)["fingerprint"] == fingerprint_of_checkpoint(TRAINED)
    with pytest.raises(CheckpointError, match=r"base/config\.json: found ModelSpec.*24.*or another WORK_DIR|expected ModelSpec"):
        prepare(tmp_path, [], "gpt-oss-20b")
    (tmp_path / "rewritten24").rename(tmp_path / "rewritten16")
    with pytest.raises(CheckpointError, match="num_experts=24.*expected .*num_experts=16"):
        prepare(tmp_path, ["rewritten16"], "tiny")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    with pytest.raises(CheckpointError, match="vocab_size: found 7; expected"):
        prepare(tmp_path, [], "tiny")


class Fakes:
    """Fake servers in place of real ones: what boots, and what masks are put."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: FakeServer, broken: tuple[str, ...] = ()) -> None:
        self.boots: list[list[str]] = []
        self.puts: list[int | None] = []
        fakes = self

        class Process:
            def poll(self) -> None:
                return None

        class Up:
            key, process, port = "k", Process(), int(server.url.rsplit(":", 1)[1])

        @contextmanager
        def booted(_: Any, rooms: Mapping[Served, int], *__: Any) -> Iterator[dict[str, Any]]:
            fakes.boots.append([one.name for one in rooms])
            yield {one.name: Up() for one in rooms if one.name not in broken}

        def put(_: Any, __: Any, variant: Variant) -> None:
            if variant.server.is_patched:
                fakes.puts.append(variant.keep)

        monkeypatch.setattr(matrix, "booted", booted)
        monkeypatch.setattr(matrix, "prepare", lambda *_: None)
        monkeypatch.setattr(matrix, "prepare_seconds", lambda *_: 0)
        monkeypatch.setattr(matrix, "masks_for", lambda _: {24: random_mask(TRAINED, 24, 1)})
        monkeypatch.setattr(matrix, "facts_of", lambda *_: FACTS)
        monkeypatch.setattr(Matrix, "_put", put)
        monkeypatch.setattr(Matrix, "_check_served", lambda *_: None)  # fake servers do not know masks


PHASES = tuple(
    replace(phase, boot_s=1, rows=tuple(replace(row, seconds=0.4) for row in phase.rows)) for phase in PLANS["tiny"]()
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


def run(server: FakeServer, folder: Path, limit_s: float, phases: tuple[Phase, ...] = PHASES, only: list[str] | None = None) -> Matrix:
    server.behave(Behaviour("vllm", 0.02, 0.01))
    store = Store(folder / "out")
    store.open(resume=True)
    return Matrix(VllmCpu(), phases, folder, store, Budget(limit_s + session.STOPPING_S), only)


def test_rows_are_kept_and_not_measured_again(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes(monkeypatch, server)
    assert run(server, tmp_path, 600, only=["keep24.bs2.new96.r1"]).run() == []
    assert fakes.boots == [["base"]]
    before = (tmp_path / "out" / "keep24.bs2.new96.r1.json").read_bytes()
    assert run(server, tmp_path, 600).run() == []
    assert fakes.boots[1:] == [["base", "rewritten24"], ["top2"], ["started24", "rewritten24"]]
    assert fakes.puts == [24, None, 24, None, None, 24, None, 24, 24]
    assert json.loads((tmp_path / "keep24.json").read_text())["keep"] == random_mask(TRAINED, 24, 1).keep
    assert (tmp_path / "out" / "keep24.bs2.new96.r1.json").read_bytes() == before
    document = json.loads(before)
    assert document["notes"]["variant"] == "keep24"
    assert document["settings"]["max_new_tokens"] == 96
    assert document["results"][0]["batch"] == 2
    assert len(list((tmp_path / "out").iterdir())) == sum(len(phase.rows) for phase in PHASES) + len(["run.json"])
    monkeypatch.setattr(matrix, "facts_of", lambda *_: {**FACTS, "gpu": "H"})
    (tmp_path / "out" / "keep24.bs2.new96.r2.json").unlink()
    with pytest.raises(InputError, match="gpu: found 'G'; expected 'H'"):
        run(server, tmp_path, 600).run()
    (tmp_path / "out" / "keep24.bs2.new96.r2.json").write_bytes(before)
    assert run(server, tmp_path, 600).run() == []
    assert len(fakes.boots) == 4


def test_a_round_is_begun_only_if_there_is_time_for_it(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes(monkeypatch, server)
    slow = tuple(replace(phase, rows=tuple(replace(row, seconds=10.0) for row in phase.rows)) for phase in PHASES)
    # A first round is 35 s, of the other two phases 24 s, with their boots and slack.
    left = {row.name for row in run(server, tmp_path, 30, slow[:2]).run()}
    assert left == {row.name for row in slow[0].rows}
    assert fakes.boots == [["top2"]]
    one = run(server, tmp_path / "b", 60)
    keep = one.store.keep

    def slower(name: str, document: dict[str, Any]) -> None:
        keep(name, document)
        one.budget.took(1, 100)

    monkeypatch.setattr(Store, "keep", lambda _, name, document: slower(name, document))
    # At fifty times of what was thought, a round of three no longer fits, and one of two does.
    assert {row.round for row in one.run()} == {"few 2", "few 3"}
    assert len(one.store.names) == 3 + 2 + 2


def test_a_server_that_is_not_up_leaves_its_rows(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fakes(monkeypatch, server, broken=("rewritten24",))
    assert {row.variant for row in run(server, tmp_path, 600).run()} == {"keep24_rewritten"}


def test_failed_rows_are_told_and_stay_left(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fakes(monkeypatch, server)
    one = run(server, tmp_path, 600, only=["unmasked.bs2.new96.r1"])
    server.behave(Behaviour("vllm", 0.02, 0.01, fault="short", faulty=2))
    assert [row.name for row in one.run()] == ["unmasked.bs2.new96.r1"]
    assert "LengthError" in (tmp_path / "out" / "unmasked.bs2.new96.r1.error").read_text()
    two = run(server, tmp_path, 600, only=["unmasked.bs2.new96.r1"])
    server.behave(Behaviour("vllm", 0.02, 0.01, cached=20))
    two.run()
    assert "prompt tokens came from the prefix cache" in (tmp_path / "out" / "unmasked.bs2.new96.r1.error").read_text()
    with pytest.raises(InputError, match="--only: found nothing; expected rows of the plan"):
        run(server, tmp_path, 600, only=["nothing"])


def test_headroom_goes_from_memory_to_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boots: list[dict[str, int]] = []
    alone = {"plain": 12.8, "rewritten16": 7.0, "rewritten24": 10.0}

    class Card(VllmCpu):
        def memory(self, server: Any, model: Path) -> dict[str, Any]:
            return {"weights_gib": alone[server.name], "graphs_gib": 1.2, "kv_gib": 4.0, "kv_tokens": 100_000}

    class Up:
        key, port = "k", 1

        def __init__(self, name: str) -> None:
            self.name = name

    @contextmanager
    def booted(_: Any, rooms: Mapping[Served, int], *__: Any) -> Iterator[dict[str, Any]]:
        boots.append({one.name: tokens for one, tokens in rooms.items()})
        yield {one.name: Up(one.name) for one in rooms}

    searches: list[Any] = []
    late: list[bool] = []

    def found(url: str, workload: Any, most: int, *, notes: dict[str, str], into: dict[str, Any], until: float, **given: Any) -> None:
        assert until - time.monotonic() <= budget[0] - session.STOPPING_S
        searches.append(given["earlier"])
        into.update(format="softprune.max-batch", notes=notes, tries=["t"], max_batch=None, limit="not known", out_of_time=True, resumed=0)
        given["progress"](Try(1, "search", None, 0, 1, 0, 1, None, None), 1)
        if not late:
            into.update(max_batch=7, limit="preempted", out_of_time=False, resumed=1 if given["earlier"] else 0)

    monkeypatch.setattr(headroom, "booted", booted)
    monkeypatch.setattr(headroom, "prepare", lambda *_: None)
    monkeypatch.setattr(headroom, "prepare_seconds", lambda *_: 0)
    monkeypatch.setattr(headroom, "facts_of", lambda *_: FACTS)
    monkeypatch.setattr(headroom, "max_batch", found)
    described: dict[str, Any] = {
        "engine": {"name": "SGLang", "version": "1"},
        "model": "m",
        "server_flags": {},
        "gpu": "G",
        "softprune": None,
    }
    monkeypatch.setattr(headroom, "describe", lambda _: described)
    store = Store(tmp_path)
    shape = Shape(cards_gib=(14.5, 24))

    budget = [0.0]

    def go(limit_s: float) -> list[str]:
        budget[0] = limit_s + session.STOPPING_S
        return Headroom(Card(), shape, tmp_path, store, Budget(budget[0])).run()

    # What a server's memory is told to hold is taken only if nothing else gave memory back meanwhile.
    described["server_flags"] = {"memory_usage": {"graph": {"decode": -0.7, "prefill": 1.9}}}
    assert len(go(65)) == 9
    assert "found -0.70 GiB of CUDA graphs" in (tmp_path / "memory.unmasked.error").read_text()
    described["server_flags"] = {"memory_usage": {"graph": {"decode": -0.02, "prefill": 1.2}}}
    boots.clear()
    assert len(go(65)) == 6
    assert boots == [{"plain": 80_000}, {"rewritten16": 80_000}, {"rewritten24": 80_000}]
    # 14.5 GiB less 1, 12.8 and 1.2 leaves nothing for the whole checkpoint. Searches whose time is over keep their tries.
    late.append(True)
    assert len(go(1000)) == 5
    assert json.loads((tmp_path / "max_batch.14.5gib.keep16.partial").read_text())["tries"] == ["t"]
    assert searches == [None] * 5
    late.clear()
    del boots[3:], searches[:]
    assert go(1000) == []
    assert [one["tries"] for one in searches] == [["t"]] * 5
    assert list(tmp_path.glob("*.partial")) == []
    none = read_rows([tmp_path / "max_batch.14.5gib.unmasked.json"]).largest
    assert [(one.batch, one.kv_tokens, one.limit) for one in none] == [(None, 0, "room for 0 KV tokens; a request needs 2304")]
    assert boots[3:] == [
        {"rewritten16": 132_500, "rewritten24": 57_499}, {"plain": 225_000, "rewritten16": 370_000}, {"rewritten24": 295_000},
    ]  # fmt: skip
    notes = json.loads((tmp_path / "max_batch.24gib.keep16.json").read_text())["notes"]
    assert notes == {
        "variant": "keep16", "card_gib": "24", "reserve_gib": "1", "kv_tokens": "370000", "kv_bytes_a_token": "42950",
        "servers_on_gpu": "2", "weights_gib": "7.000", "graphs_gib": "1.200",
    }  # fmt: skip


def test_figures(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fakes(monkeypatch, server)
    raw, results = tmp_path / "out", tmp_path / "results"
    results.mkdir()
    assert run(server, tmp_path, 600).run() == []
    for path in session.row_files(raw):
        document = json.loads(path.read_text())
        factor = {"unmasked": 1.0, "keep24": 1.1, "keep24_rewritten": 1.0}.get(document["notes"]["variant"], 1.2)
        document["results"][0]["decode_tok_s"]["median"] = 100 * factor
        document["settings"]["max_new_tokens"] = 2048 if "bs2" in path.name else 16
        path.write_text(json.dumps(document))
    names = write_figures(raw, results)
    assert names[:2] == ["vllm_decode_gpu.json", "vllm_decode_ratios.svg"]
    assert set(names[2:]) == {
        "vllm.decode.keep24_over_unmasked.bs2", "vllm.decode.keep24_rewritten_over_unmasked.bs2",
        "vllm.decode.keep24_masked_over_rewritten.bs2", "vllm_started_gpu.json",
    }  # fmt: skip
    (started,) = json.loads((results / "vllm_started_gpu.json").read_text())["compared"]
    assert (started["a"], started["b"], started["ratio"]["pairs"]) == ("keep24_rewritten", "keep24_started", pytest.approx([1.2]))
    assert headline.read(results / "headline.json")["vllm.decode.keep24_over_unmasked.bs2"]["value"] == pytest.approx(1.1)
    assert "streams" not in (results / "vllm_decode_gpu.json").read_text().replace("streams, the records", "")
    rows = read_rows([results / "vllm_decode_gpu.json"])
    assert len(rows.compared) == 3
    assert rows.compared[0].pairs == 3
    for path in session.row_files(raw):
        if not path.name.startswith("unmasked"):
            path.unlink()
    assert write_figures(raw, results) == ["vllm_decode_gpu.json"], "nothing to compare"


def test_only_rows_of_one_boot_are_compared() -> None:
    def document(variant: str, boot: str, round: str, speed: float) -> dict[str, Any]:
        engine = {"engine": {"name": "SGLang", "version": "1"}, "gpu": "G", "settings": {"prompt_tokens": 1, "max_new_tokens": 2048}}
        result = {"batch": 32, "decode_tok_s": None, "total_tok_s": {"median": speed}}
        return {**engine, "notes": {"variant": variant, "boot": boot, "round": round}, "results": [result]}

    documents = [
        document("unmasked", "1", "a 1", 100), document("keep24", "1", "a 1", 110), document("unmasked", "1", "a 2", 100),
        document("keep24", "2", "a 2", 999), document("unmasked", "2", "a 3", 200), document("keep24", "2", "a 3", 224),
    ]  # fmt: skip
    (found,) = compared(documents)
    assert found["ratio"]["pairs"] == pytest.approx([1.10, 1.12])
    assert found["ratio"]["verdict"] == "too few pairs"


def test_largest_batches_become_headlines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, results = tmp_path / "raw", tmp_path / "results"
    raw.mkdir()
    results.mkdir()
    for card, variant, batch, speed in ((16, "unmasked", 10, 1500.0), (16, "keep16", 70, 6000.0), (24, "keep16", 150, 9000.0)):
        result = {"batch": batch, "repeats": [{"decode_tok_s": speed}] * 3, "decode_tok_s": {"median": speed}}
        document = {
            "format": "softprune.max-batch", "version": 1, "engine": {"name": "SGLang", "version": "1"}, "model": "base", "gpu": "G",
            "server_flags": {}, "notes": {"variant": variant, "card_gib": str(card)}, "max_batch": batch, "result": result,
            "next_failed": batch + 1, "error": None,
        }  # fmt: skip
        (raw / f"{card}{variant}.json").write_text(json.dumps(document))
    no_room = {**document, "notes": {"variant": "unmasked", "card_gib": "24"}, "max_batch": None, "result": None}
    (raw / "24unmasked.json").write_text(json.dumps(no_room))
    write_figures(raw, results)
    figures = {name: (one["value"], one["unit"]) for name, one in headline.read(results / "headline.json").items()}
    assert figures == {
        "sglang.max_batch_16gib.unmasked": (10, "requests"), "sglang.max_batch_16gib.unmasked_tok_s": (1500, "tok/s"),
        "sglang.max_batch_16gib.keep16": (70, "requests"), "sglang.max_batch_16gib.keep16_tok_s": (6000, "tok/s"),
        "sglang.max_batch_16gib.keep16_over_unmasked": (7, "ratio"), "sglang.max_batch_16gib.keep16_over_unmasked_tok_s": (4, "ratio"),
        "sglang.max_batch_24gib.keep16": (150, "requests"), "sglang.max_batch_24gib.keep16_tok_s": (9000, "tok/s"),
        "sglang.max_batch_24gib.unmasked": (0, "requests"),
    }  # fmt: skip
    with pytest.raises(InputError, match="no rows"):
        write_figures(results / "none", results)
    document = json.loads((raw / "24keep16.json").read_text())
    (raw / "24keep16.json").write_text(json.dumps({**document, "next_failed": 153}))
    assert [name for name in write_figures(raw, results) if "24gib" in name] == ["sglang.max_batch_24gib.unmasked"]
    assert "24gib.keep16: no headline: at least 150 run, 153 do not" in capsys.readouterr().out
    (raw / "run.json").write_text("{}")  # no row
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    for other in ({"gpu": "H"}, {"engine": {"name": "SGLang", "version": "2"}}, {"softprune_version": "2"}):
        (raw / "24keep16.json").write_text(json.dumps({**document, **other}))
        with pytest.raises(InputError, match="GPU, SGLang version, softprune version: found .*; .*; expected the same ones in every row"):
            write_figures(raw, results)
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_memory_that_sglang_tells_is_all_that_a_smaller_cards_room_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    account = {"weight": 15.021, "kvcache": 3.296, "token_capacity": 80_000, "graph": {"prefill": 0.5, "decode": 1.121}}
    monkeypatch.setattr(launchers, "about", lambda _: {"internal_states": [{"memory_usage": account}]})
    memory = Sglang().memory(None, Path())  # type: ignore[arg-type]
    assert memory == {"weights_gib": 15.021, "graphs_gib": 1.621, "kv_gib": 3.296, "kv_tokens": 80_000}
    assert Shape().room(24, memory) == 154_320


def test_commands() -> None:
    command = Sglang().command(Path("m"), 1, 80_000, 64)
    assert command[command.index("--max-total-tokens") + 1] == "80000"
    command = Vllm().command(Path("m"), 1, 80_000, 32)
    assert command[command.index("--kv-cache-memory-bytes") + 1] == str(80_000 * 49_152)
    assert '{"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}' in command
    assert not REWRITTEN[24].is_patched
    result = CliRunner().invoke(app, ["plan", "sglang"])
    assert "phase few: 3 servers at once (base, rewritten24, rewritten16), 80,000 KV tokens each" in result.output
    assert CliRunner().invoke(app, ["plan", "x"]).exit_code == 2
    assert "max_batch.24gib.keep24" in CliRunner().invoke(app, ["plan", "headroom"]).output
