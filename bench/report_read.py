"""From raw JSON to the rows of a report. A kind of document is a reader here."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from softprune.bench.graph_memory import graphs_gib
from softprune.bench.packed import unpacked
from softprune.bench.report_rows import Compared, Largest, Memory, Rows, Served, Setting, Speed
from softprune.errors import InputError, shortened


def read_rows(files: Iterable[Path]) -> Rows:
    """Rows of raw files, those of one model, mask, batch and setting pooled.

    Raises:
        InputError: a file cannot be read, or is none that softprune's benchmarks write.
    """
    rows = Rows()
    for path in files:
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(str(path), "", str(error), "a raw JSON file of softprune bench") from None
        if not isinstance(document, dict):
            raise InputError(str(path), "", shortened(document), "a JSON object")
        take(document, rows, str(path))
    rows.speeds, rows.largest = _told_apart(rows.speeds), _told_apart(rows.largest)
    rows.speeds = _pooled(rows)
    return rows


def take(document: Mapping[str, Any], rows: Rows, source: str) -> None:
    """Add a document's rows.

    Raises:
        InputError: it has a format or a version that nobody reads, or a field is missing or not what it should be.
    """
    kind, version = document.get("format"), document.get("version")
    if not isinstance(kind, str) or kind not in _READERS or version != 1:
        raise InputError(source, "format, version", f"{kind!r}, {version!r}", f"one of {', '.join(_READERS)}, version 1")
    try:
        _READERS[kind](document, rows)
    except KeyError as error:
        raise InputError(source, str(error.args[0]), "nothing", f"this field, as {kind} has it") from None
    except InputError as error:  # of a document inside this one
        raise InputError(source, ", ".join(filter(None, (error.file, error.field))), error.found, error.expected) from None
    except (TypeError, AttributeError, ValueError) as error:
        raise InputError(source, "", f"a field of another type ({error})", f"fields as {kind} has them") from None
    if document.get("error"):
        rows.note(f"{source} ended with an error: {document['error']}")


def variant_of(head: Mapping[str, Any]) -> str:
    """What is served, in words: of a note that says so, else of softprune's own view."""
    if text := (head.get("notes") or {}).get("variant"):
        return str(text)
    served = head.get("softprune")
    if not served:
        return "without softprune"
    kept = sorted(set(served.get("num_kept") or []))
    masked = served.get("mask_hash") and kept
    text = "unmasked" if not masked else f"keep {kept[0]}" if len(kept) == 1 else f"keep {kept[0]} to {kept[-1]}"
    top_k = served.get("top_k")
    return f"{text}, top_k {top_k}" if top_k else text


def served_of(head: Mapping[str, Any]) -> Served:
    """Which mask and model are served, as softprune told."""
    served = head.get("softprune") or {}
    return served.get("mask_hash"), served.get("fingerprint")


def setting_of(head: Mapping[str, Any], settings: Mapping[str, Any], stream: bool) -> Setting:
    """What a document with this head and these settings measured."""
    engine = head["engine"]
    name = f"{engine['name']} {engine['version']}" if engine.get("name") else "unknown engine"
    return Setting(name, head["gpu"] or "no GPU", settings["prompt_tokens"], settings["max_new_tokens"], stream)


def _decode(document: Mapping[str, Any], rows: Rows) -> None:
    model, variant = document["model"] or "unknown model", variant_of(document)
    for row in document["results"]:
        stream = row["decode_tok_s"] is not None
        setting = setting_of(document, document["settings"], stream)
        values = _values(row["repeats"], setting)
        ttft, between = ((row[name] or {}).get("median") for name in ("ttft_p50_s", "inter_token_p50_ms"))
        rows.speeds.append(Speed(setting, model, variant, row["batch"], served_of(document), values, ttft, between, _flags(document)))
    usage = document["server_flags"].get("memory_usage")
    if usage and not _booted_alone(document):
        rows.note("Memory of servers that shared a GPU while they booted is left out: engines take it for what was free before and after.")
    elif usage:
        parts = (usage["weight"], usage["kvcache"], graphs_gib(usage["graph"]))
        _remember(rows, f"{model}, {variant}, {document['gpu']}", parts)


def _comparison(document: Mapping[str, Any], rows: Rows) -> None:
    sides = document["sides"]
    names = {}
    for side, head in sides.items():
        names[side] = head["name"] if len({one["model"] for one in sides.values()}) == 1 else f"{head['model']}, {head['name']}"
    variants = _variants(sides)
    for row in document["results"]:
        settings = [setting_of(sides[side], document["settings"], row["figure"] == "decode_tok_s") for side in ("a", "b")]
        if settings[0] != settings[1]:
            rows.note(f"{names['a']} ran on {settings[0].text}; {names['b']} on {settings[1].text}.")
        for side, setting in zip(("a", "b"), settings, strict=True):
            if row[side]:
                head, values = sides[side], _values(row[side]["repeats"], setting)
                model = head["model"] or "unknown model"
                rows.speeds.append(Speed(setting, model, variants[side], row["batch"], served_of(head), values, flags=_flags(head)))
        found = (row["ratio"] or {}).get(row["figure"])
        if found:
            roof = row.get("roofline") or {}
            shares = tuple((roof.get(side) or {}).get("share") for side in ("a", "b"))
            edges = (found["median"], found["low"], found["high"])
            rows.compared.append(
                Compared(
                    settings[1], names["a"], names["b"], row["batch"], len(found["pairs"]), *edges, row["says"], (shares[0], shares[1])
                )
            )


def _max_batch(document: Mapping[str, Any], rows: Rows) -> None:
    result, memory = document["result"], document["memory"]
    setting = setting_of(document, document["settings"], bool(result and result["decode_tok_s"]))
    values = _values(result["repeats"], setting) if result else ()
    model, variant = document["model"] or "unknown model", variant_of(document)
    size, failed = document["max_batch"], document.get("next_failed")
    is_exact = size is None or failed is None or failed == size + 1
    kv_tokens, limit = memory["kv_tokens"], document["limit"] or ""
    rows.largest.append(Largest(setting, model, variant, served_of(document), kv_tokens, size, limit, values, is_exact))
    if _booted_alone(document):
        _remember(rows, f"{model}, {variant}, {document['gpu']}, {kv_tokens} KV tokens", _parts(memory))


def _gpu_memory(document: Mapping[str, Any], rows: Rows) -> None:
    _remember(rows, f"{document['model']}, {document['gpu']}", _parts(document["memory"]))


def _matrix(document: Mapping[str, Any], rows: Rows) -> None:
    for one in unpacked(document):
        take(one, rows, document["what"])
    for row in document["compared"]:
        found = row["ratio"]
        edges = (found["median"], found["low"], found["high"])
        rows.compared.append(
            Compared(Setting(**row["setting"]), row["a"], row["b"], row["batch"], len(found["pairs"]), *edges, row["says"])
        )


_READERS: dict[str, Callable[[Mapping[str, Any], Rows], None]] = {
    "softprune.decode-benchmark": _decode,
    "softprune.decode-comparison": _comparison,
    "softprune.max-batch": _max_batch,
    "softprune.gpu-memory": _gpu_memory,
    "softprune.gpu-matrix": _matrix,
}


def _booted_alone(document: Mapping[str, Any]) -> bool:
    notes = document.get("notes") or {}
    return "others" not in notes and int(notes.get("servers_on_gpu", 1)) == 1


def _parts(memory: Mapping[str, Any]) -> tuple[float | None, ...]:
    return memory["weights_gib"], memory["kv_gib"], graphs_gib(memory["graphs_gib"])


def _remember(rows: Rows, label: str, parts: tuple[float | None, ...]) -> None:
    """Weights, KV and graphs of a server, if its engine told all of them."""
    known = [float(part) for part in parts if part is not None]
    if len(known) == len(parts) and (memory := Memory(label, *known)) not in rows.memory:
        rows.memory.append(memory)


def _values(repeats: Sequence[Mapping[str, Any]], setting: Setting) -> tuple[float, ...]:
    """The speed of every repeat; ValueError if there is none."""
    if not repeats:
        raise ValueError("no repeats")
    return tuple(float(repeat[setting.figure]) for repeat in repeats)


def _flags(head: Mapping[str, Any]) -> tuple[str, ...]:
    """Server flags that a figure may depend on."""
    flags = {name: value for name, value in head["server_flags"].items() if name not in ("memory_usage", "random_seed")}
    return (json.dumps(flags, sort_keys=True),)


def _variants(sides: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What each side serves, with the side's own name where nothing else tells them apart."""
    words = {side: variant_of(head) for side, head in sides.items()}
    if len({(head["model"], words[side], served_of(head)) for side, head in sides.items()}) == len(sides):
        return words
    names = {side: head["name"] for side, head in sides.items()}
    if len(set(names.values())) < len(names):
        names = {side: side.upper() for side in sides}
    return {side: f"{text}, {names[side]}" for side, text in words.items()}


Row = TypeVar("Row", Speed, Largest)


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Rows with the start of the mask's hash or the model's fingerprint added to words that stand for several of them."""
    found: dict[tuple[str, str], set[Served]] = defaultdict(set)
    for row in rows:
        found[row.model, row.variant].add(row.served)

    def one(row: Row) -> Row:
        same, text = found[row.model, row.variant], row.variant
        for place, what in enumerate(("mask", "model")):
            if len({served[place] for served in same}) > 1:
                digest = row.served[place]
                text += f", {what} {digest.partition(':')[2][:8]}" if digest else f", no {what} hash"
        return replace(row, variant=text)

    return [one(row) for row in rows]


def _pooled(rows: Rows) -> list[Speed]:
    """Rows of one thing as one, in the order in which they came."""
    found: dict[tuple[Setting, str, str, int, Served], list[Speed]] = {}
    for one in rows.speeds:
        found.setdefault((one.setting, one.model, one.variant, one.batch, one.served), []).append(one)
    pooled, mixed = [], []
    for (setting, model, variant, batch, served), same in found.items():
        flags = tuple(sorted({text for one in same for text in one.flags}))
        if len(flags) > 1:
            mixed.append(f"{model}, {variant}, batch {batch}")
        values = tuple(value for one in same for value in one.tok_s)
        times = (_middle(same, "ttft_s"), _middle(same, "inter_token_ms"))
        pooled.append(Speed(setting, model, variant, batch, served, values, *times, flags))
    if mixed:
        rows.note(f"Repeats of servers with different flags are in one row: {'; '.join(mixed)}.")
    return pooled


def _middle(rows: Sequence[Speed], name: str) -> float | None:
    known = [value for row in rows if (value := getattr(row, name)) is not None]
    return statistics.median(known) if known else None
