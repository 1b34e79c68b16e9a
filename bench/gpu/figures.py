"""From a run's raw files to the committed ones and the headline figures.

A ratio is the median over rounds of one variant's speed over another's, of rows that the same boot of servers measured in the same round.
A ratio of fewer than three rounds is in the raw file and is no headline, nor is a largest batch that is not known exactly. Committed files
hold every row, without the records of single requests (`softprune.bench.packed`), and have a picture of their ratios.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import typer

from softprune.bench.gpu.session import row_files
from softprune.bench.headline import record
from softprune.bench.intervals import ENOUGH, ratio
from softprune.bench.packed import packed
from softprune.bench.report_read import read_rows, setting_of
from softprune.bench.report_rows import Setting, by_setting
from softprune.errors import InputError
from softprune.files import write_whole

MOST_BYTES = 3_000_000
"""Of all files under bench/results."""
_OVER_UNMASKED = ("keep24", "keep16", "keep24_rewritten", "keep16_rewritten", "top2", "keep24_top2")
_STARTED = ("keep24_started", "keep16_started")
PAIRS: Mapping[tuple[str, str], str] = {
    ("keep24_rewritten", "keep24"): "keep24_masked_over_rewritten",
    ("keep16_rewritten", "keep16"): "keep16_masked_over_rewritten",
    **{(one.replace("started", "rewritten"), one): f"{one}_over_rewritten" for one in _STARTED},
    **{(one.removesuffix("_started"), one): f"{one}_over_live" for one in _STARTED},
    **{("unmasked", one): f"{one}_over_unmasked" for one in _OVER_UNMASKED},
}
"""(A, B): what B over A is called."""
HEADLINE_TOKENS = 2048
Documents = Sequence[Mapping[str, Any]]


def compared(documents: Documents) -> list[dict[str, Any]]:
    """Ratios of all pairs that were measured, JSON-ready."""
    rows: dict[tuple[Setting, int], dict[tuple[str, str], dict[str, float]]] = {}
    for document in documents:
        for result in document["results"]:
            setting = setting_of(document, document["settings"], result["decode_tok_s"] is not None)
            notes, speed = document["notes"], result[setting.figure]["median"]
            of_round = rows.setdefault((setting, result["batch"]), {}).setdefault((notes["boot"], notes["round"]), {})
            of_round[notes["variant"]] = speed
    found = []
    for ((setting, batch), rounds), (a, b) in itertools.product(sorted(rows.items(), key=lambda item: item[0]), PAIRS):
        pairs = [(one[a], one[b]) for _, one in sorted(rounds.items()) if a in one and b in one]
        if pairs:
            result = ratio([one for one, _ in pairs], [other for _, other in pairs])
            found.append({"setting": asdict(setting), "a": a, "b": b, "batch": batch, "ratio": result.record(), "says": result.says})
    return found


def write_figures(raw: Path, results: Path) -> list[str]:
    """Write the committed files and headline.json; names of all that was written.

    Args:
        raw: folder of a run's raw files.
        results: bench/results.

    Raises:
        InputError: there is nothing, or rows of an engine are of several machines or versions, which nothing is written of; or the
            results have become too large, which stay to be looked at.
    """
    documents = [json.loads(path.read_text()) for path in row_files(raw)]
    by_format = {kind: [one for one in documents if one["format"] == f"softprune.{kind}"] for kind in ("decode-benchmark", "max-batch")}
    if not any(by_format.values()):
        raise InputError(str(raw), "", "no rows", "raw files of a run")
    _check_alike(documents, raw)
    written: list[str] = []
    of_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in by_format["decode-benchmark"]:
        kind = "started" if one["notes"]["phase"].startswith("started") else "decode"
        of_kind.setdefault((one["engine"]["name"].lower(), kind), []).append(one)
    for (engine, kind), rows in sorted(of_kind.items()):
        ratios = compared(rows)
        name = f"{engine}_{kind}_gpu.json"
        _write(results / name, packed(rows, f"softprune.bench.gpu {engine}", ratios))
        pictures = _picture(results / name) if kind == "decode" else ()
        written += [name, *pictures, *_decode_headlines(engine, ratios, results, name)]
    if searches := by_format["max-batch"]:
        name = "sglang_max_batch_gpu.json"
        memory = [one for one in documents if one["format"] == "softprune.gpu-memory"]
        _write(results / name, packed([*memory, *searches], "softprune.bench.gpu headroom", []))
        written += [name, *_max_batch_headlines(searches, results, name)]
    if (size := sum(path.stat().st_size for path in results.iterdir())) > MOST_BYTES:
        raise InputError(str(results), "size", f"{size:,} bytes", f"at most {MOST_BYTES:,}")
    return written


def _picture(decode: Path) -> Iterator[str]:
    """Draw the ratios of the setting that has the most batch sizes, if there are any; the picture's name."""
    from softprune.bench.report_plot import plot_ratios

    if settings := by_setting(read_rows([decode]).compared):
        path = decode.with_name(decode.name.replace("_gpu.json", "_ratios.svg"))
        plot_ratios(max(settings, key=lambda rows: len({one.batch for one in rows})), path)
        yield path.name


def _check_alike(documents: Documents, raw: Path) -> None:
    """See that rows of one engine are of one GPU, engine version and softprune version, as their figures have one name."""
    heads: dict[str, set[tuple[str, ...]]] = {}
    for one in documents:
        head = (str(one["gpu"]), str(one["engine"]["version"]), str(one.get("softprune_version")))
        heads.setdefault(one["engine"]["name"], set()).add(head)
    for engine, found in heads.items():
        if len(found) > 1:
            texts = "; ".join(", ".join(head) for head in sorted(found))
            raise InputError(str(raw), f"GPU, {engine} version, softprune version", texts, "the same ones in every row")


def _decode_headlines(engine: str, ratios: list[dict[str, Any]], results: Path, raw: str) -> Iterator[str]:
    for one in ratios:
        if one["setting"]["max_new_tokens"] == HEADLINE_TOKENS and len(one["ratio"]["pairs"]) >= ENOUGH:
            name = f"{engine}.decode.{PAIRS[one['a'], one['b']]}.bs{one['batch']}"
            record(results / "headline.json", name, round(one["ratio"]["median"], 4), "ratio", raw)
            yield name


def _max_batch_headlines(searches: Documents, results: Path, raw: str) -> Iterator[str]:
    figures: dict[str, tuple[float, str]] = {}
    for card in sorted({one["notes"]["card_gib"] for one in searches}):
        stem = f"sglang.max_batch_{card}gib"
        of_card = [one for one in searches if one["notes"]["card_gib"] == card]
        no_room = [one for one in of_card if one["max_batch"] is None and one["error"] is None]
        figures |= {f"{stem}.{one['notes']['variant']}": (0, "requests") for one in no_room}
        found = {one["notes"]["variant"]: one for one in of_card if one["max_batch"]}
        for variant, one in list(found.items()):
            if one["next_failed"] not in (None, one["max_batch"] + 1):
                typer.echo(f"{stem}.{variant}: no headline: at least {one['max_batch']} run, {one['next_failed']} do not")
                del found[variant]
        speeds = {variant: median(repeat["decode_tok_s"] for repeat in one["result"]["repeats"]) for variant, one in found.items()}
        for variant, one in found.items():
            figures |= {f"{stem}.{variant}": (one["max_batch"], "requests"), f"{stem}.{variant}_tok_s": (speeds[variant], "tok/s")}
            if variant != "unmasked" and "unmasked" in found:
                base = found["unmasked"]
                figures[f"{stem}.{variant}_over_unmasked"] = (one["max_batch"] / base["max_batch"], "ratio")
                figures[f"{stem}.{variant}_over_unmasked_tok_s"] = (speeds[variant] / speeds["unmasked"], "ratio")
    for name, (value, unit) in figures.items():
        record(results / "headline.json", name, round(value, 4), unit, raw)
        yield name


def _write(path: Path, document: dict[str, Any]) -> None:
    write_whole(path, json.dumps(document, indent=1) + "\n")
