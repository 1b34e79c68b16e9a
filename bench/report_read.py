"""From raw JSON to the rows of a report. A kind of document is a reader here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softprune.bench.packed import unpacked
from softprune.bench.report_rows import Compared, Largest, Memory, Rows, Setting, Speed
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
    rows.speeds = _pooled(rows)
    return rows


def take(document: Mapping[str, Any], rows: Rows, source: str) -> None:
    """Add a document's rows.

    Raises:
        InputError: it has a format or a version that nobody reads, or lacks a field.
    """
    kind, version = document.get("format"), document.get("version")
    if kind not in _READERS or version != 1:
        raise InputError(source, "format, version", f"{kind!r}, {version!r}", f"one of {', '.join(_READERS)}, version 1")
    try:
        _READERS[kind](document, rows)
    except KeyError as error:
        raise InputError(source, str(error.args[0]), "nothing", f"this field, as {kind} has it") from None
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


def setting_of(head: Mapping[str, Any], settings: Mapping[str, Any], stream: bool) -> Setting:
    """What a document with this head and these settings measured."""
    engine = head["engine"]
    name = f"{engine['name']} {engine['version']}" if engine.get("name") else "unknown engine"
    return Setting(name, head["gpu"] or "no GPU", settings["prompt_tokens"], settings["max_new_tokens"], stream)


def _decode(document: Mapping[str, Any], rows: Rows) -> None:
    model, variant = document["model"] or "unknown model", variant_of(document)
    flags = {name: value for name, value in document["server_flags"].items() if name not in ("memory_usage", "random_seed")}
    for row in document["results"]:
        stream = row["decode_tok_s"] is not None
        setting = setting_of(document, document["settings"], stream)
        values = tuple(repeat[setting.figure] for repeat in row["repeats"])
        ttft, between = ((row[name] or {}).get("median") for name in ("ttft_p50_s", "inter_token_p50_ms"))
        rows.speeds.append(Speed(setting, model, variant, row["batch"], values, ttft, between, (json.dumps(flags, sort_keys=True),)))
    usage = document["server_flags"].get("memory_usage")
    if usage and not _booted_alone(document):
        rows.note("Memory of servers that shared a GPU while they booted is left out: engines take it for what was free before and after.")
    elif usage:
        # An engine that subtracts what is free after from before can find a little less than nothing.
        graphs = sum(max(0.0, gib) for gib in usage["graph"].values())
        _remember(rows, Memory(f"{model}, {variant}, {document['gpu']}", usage["weight"], usage["kvcache"], graphs))


def _comparison(document: Mapping[str, Any], rows: Rows) -> None:
    sides = document["sides"]
    names = {}
    for side, head in sides.items():
        names[side] = head["name"] if len({one["model"] for one in sides.values()}) == 1 else f"{head['model']}, {head['name']}"
    for row in document["results"]:
        settings = [setting_of(sides[side], document["settings"], row["figure"] == "decode_tok_s") for side in ("a", "b")]
        if settings[0] != settings[1]:
            rows.note(f"{names['a']} ran on {settings[0].text}; {names['b']} on {settings[1].text}.")
        for side, setting in zip(("a", "b"), settings, strict=True):
            if row[side]:
                values = tuple(repeat[setting.figure] for repeat in row[side]["repeats"])
                rows.speeds.append(Speed(setting, sides[side]["model"], variant_of(sides[side]), row["batch"], values))
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
    values = tuple(repeat[setting.figure] for repeat in result["repeats"]) if result else ()
    model, variant = document["model"] or "unknown model", variant_of(document)
    rows.largest.append(Largest(setting, model, variant, memory["kv_tokens"], document["max_batch"], document["limit"] or "", values))
    parts = (memory["weights_gib"], memory["kv_gib"], memory["graphs_gib"])
    if _booted_alone(document) and None not in parts:
        _remember(rows, Memory(f"{model}, {variant}, {document['gpu']}, {memory['kv_tokens']} KV tokens", *parts))


def _gpu_memory(document: Mapping[str, Any], rows: Rows) -> None:
    memory = document["memory"]
    _remember(rows, Memory(f"{document['model']}, {document['gpu']}", memory["weights_gib"], memory["kv_gib"], memory["graphs_gib"]))


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


def _remember(rows: Rows, memory: Memory) -> None:
    if memory not in rows.memory:
        rows.memory.append(memory)


def _pooled(rows: Rows) -> list[Speed]:
    """Rows of one thing as one, in the order in which they came."""
    found: dict[tuple[Setting, str, str, int], list[Speed]] = {}
    for one in rows.speeds:
        found.setdefault((one.setting, one.model, one.variant, one.batch), []).append(one)
    pooled, mixed = [], []
    for (setting, model, variant, batch), same in found.items():
        flags = tuple(sorted({text for one in same for text in one.flags}))
        if len(flags) > 1:
            mixed.append(f"{model}, {variant}, batch {batch}")
        values = tuple(value for one in same for value in one.tok_s)
        pooled.append(Speed(setting, model, variant, batch, values, _middle(same, "ttft_s"), _middle(same, "inter_token_ms"), flags))
    if mixed:
        rows.note(f"Repeats of servers with different flags are in one row: {'; '.join(mixed)}.")
    return pooled


def _middle(rows: Sequence[Speed], name: str) -> float | None:
    known = [value for row in rows if (value := getattr(row, name)) is not None]
    return statistics.median(known) if known else None
