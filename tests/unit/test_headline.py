"""headline.json holds checked figures only, and a refused one changes nothing."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from softprune.bench import headline
from softprune.errors import InputError

RESULTS = Path(__file__).parent.parent.parent / "bench" / "results"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    for name in ("a.json", "raw/b.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path / "headline.json"


def test_record_and_read(file: Path) -> None:
    headline.record(file, "vllm.mask.keep24_over_unmasked.bs32", 1.25, "x", "raw/b.json")
    headline.record(file, "a.b", 3, "ms", "a.json")
    headline.record(file, "a.b", 4, "ms", "a.json")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    figures = headline.read(file)
    assert list(figures) == ["a.b", "vllm.mask.keep24_over_unmasked.bs32"]
    assert figures["a.b"] == {"value": 4, "unit": "ms", "raw": "a.json", "date": today}
    assert json.loads(file.read_text()) == figures
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.json", "headline.json", "raw"]


def test_the_same_figure_keeps_its_date(file: Path) -> None:
    old = {"value": 3, "unit": "ms", "raw": "a.json", "date": "2025-01-31"}
    file.write_text(json.dumps({"a.b": old, "c.d": old}))
    headline.record(file, "a.b", 3, "ms", "a.json")
    headline.record(file, "c.d", 3, "s", "a.json")
    figures = headline.read(file)
    assert figures["a.b"] == old
    assert figures["c.d"]["date"] > "2025-01-31"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "one"}, "'one': found this name"),
        ({"name": "Upper.case"}, "'Upper.case': found this name"),
        ({"name": "a..b"}, "'a..b': found this name"),
        ({"value": float("nan")}, "a.b.value: found nan; expected a finite number"),
        ({"value": float("inf")}, "a.b.value: found inf"),
        ({"value": True}, "a.b.value: found True"),
        ({"value": "1"}, "a.b.value: found '1'"),
        ({"unit": ""}, "a.b.unit: found ''"),
        ({"raw": "none.json"}, "a.b.raw: found no file none.json"),
        ({"raw": "raw"}, "a.b.raw: found no file raw"),
        ({"raw": "../a.json"}, "a.b.raw: found '../a.json'; expected a path relative"),
        ({"raw": "/etc/hosts"}, "a.b.raw: found '/etc/hosts'; expected a path relative"),
    ],
)
def test_refused_figures_change_nothing(file: Path, change: dict[str, Any], message: str) -> None:
    headline.record(file, "x.y", 1, "x", "a.json")
    before = file.read_bytes()
    with pytest.raises(InputError) as caught:
        headline.record(file, **{"name": "a.b", "value": 1.0, "unit": "x", "raw": "a.json", **change})
    assert message in str(caught.value)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "found []; expected a JSON object"),
        ('{"a.b": 3}', "a.b: found 3; expected an object of date, raw, unit, value"),
        ('{"a.b": {"value": 1, "unit": "x", "raw": "a.json"}}', "expected an object of date, raw, unit, value"),
        ('{"a.b": {"value": 1, "unit": "x", "raw": "a.json", "date": "May"}}', "a.b.date: found 'May'"),
        ('{"a.b": {"value": 1, "unit": "x", "raw": "gone.json", "date": "2025-01-31"}}', "a.b.raw: found no file gone.json"),
    ],
)
def test_a_file_written_by_hand_is_checked(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        headline.read(file)
    assert message in str(caught.value)


def test_no_file(file: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        headline.read(file)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.name)
def test_committed_results_are_json_to_strict_readers(path: Path) -> None:
    """JSON has no NaN and no Infinity, which Python writes and reads all the same."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{path.name} holds {constant}")

    json.loads(path.read_text(), parse_constant=refuse)
