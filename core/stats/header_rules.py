"""Reading a statistics file's header, and the rules that it obeys."""

from __future__ import annotations

import itertools
import json
from typing import NoReturn

from pydantic import ValidationError

from softprune.errors import shortened
from softprune.stats.errors import StatisticsError
from softprune.stats.header import DEFAULT_TAG, FORMAT, MAX_TAG_LENGTH, MODES, VERSION, Header, Mode


def parse(text: str, source: str) -> Header:
    """Read a header from its JSON.

    Raises:
        StatisticsError: no JSON, another format or version, or a rule broken; `source` is the file's name in it.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StatisticsError(source, "header", f"no valid JSON ({error})", "the JSON of a statistics file") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else data
        raise StatisticsError(source, "format", shortened(found), f'"{FORMAT}"')
    if data.get("version") != VERSION or isinstance(data["version"], bool):
        raise StatisticsError(source, "version", shortened(data.get("version")), f"{VERSION}, the only one that this softprune reads")
    try:
        header = Header.model_validate(data)
    except ValidationError as error:
        _raise_first(error, source)
    check(header, source)
    return header


def check(header: Header, source: str) -> None:
    """What single fields cannot say.

    Raises:
        StatisticsError: a rule is broken.
    """
    model = header.model
    _require(model.fingerprint is not None, source, "model.fingerprint", "null", "the fingerprint of the model that was served")
    _require(model.top_k <= model.num_experts, source, "model.top_k", model.top_k, f"at most model.num_experts = {model.num_experts}")
    _check_epochs(header, source)
    _check_tags(header, source)
    _check_modes(header, source)


def _check_epochs(header: Header, source: str) -> None:
    model, runs, first = header.model, [run.id for run in header.runs], header.epochs[0]
    _require(len(set(runs)) == len(runs), source, "runs", "a run id twice", "each run once")
    for i, epoch in enumerate(header.epochs):
        field = f"epochs[{i}]"
        _require(epoch.run in runs, source, f"{field}.run", shortened(epoch.run), "the id of one of the runs")
        _require(epoch.mask == first.mask, source, f"{field}.mask", epoch.mask, f"{first.mask}, as in epochs[0]: one mask a file")
        for name, values, top in (("num_kept", epoch.num_kept, model.num_experts), ("top_k", epoch.top_k, model.top_k)):
            named = f"{field}.{name}"
            number = f"one number for each of {model.num_layers} layers"
            _require(len(values) == model.num_layers, source, named, f"{len(values)} numbers", number)
            _require(all(1 <= value <= top for value in values), source, named, values, f"numbers from 1 to {top}")
            unpruned = epoch.mask is not None or name == "top_k" or set(values) == {top}
            _require(unpruned, source, named, values, f"{top} in every layer without a mask")
            _require(values == getattr(first, name), source, named, values, "the same as in epochs[0]")
        fits = all(k <= n for k, n in zip(epoch.top_k, epoch.num_kept, strict=True))
        _require(fits, source, f"{field}.top_k", epoch.top_k, "at most num_kept in every layer")
    pairs = [(epoch.run, epoch.epoch) for epoch in header.epochs]
    _require(len(set(pairs)) == len(pairs), source, "epochs", "an epoch of a run twice", "each once")
    _require({epoch.run for epoch in header.epochs} == set(runs), source, "epochs", "a run without an epoch", "at least one for each run")


def _check_tags(header: Header, source: str) -> None:
    tags = header.tags
    _require(tags[:1] == [DEFAULT_TAG], source, "tags", tags[:1], f'"{DEFAULT_TAG}" first')
    _require(len(set(tags)) == len(tags), source, "tags", "a tag twice", "each once")
    for i, tag in enumerate(tags):
        _require(0 < len(tag) <= MAX_TAG_LENGTH, source, f"tags[{i}]", f"{len(tag)} characters", f"from 1 to {MAX_TAG_LENGTH}")
        _require(tag.isprintable(), source, f"tags[{i}]", shortened(tag), "printable characters")
    _require(set(header.tokens) == set(tags), source, "tokens", sorted(header.tokens), "one entry for each tag")


def _check_modes(header: Header, source: str) -> None:
    collected = [mode for mode in MODES if any(mode in run.modes for run in header.runs)]
    _require(header.modes == collected, source, "modes", header.modes, f"{collected}, those of the runs")
    for name, every in header.sampling.items():
        _require(every >= 1, source, f"sampling.{name}", every, "N of 1 token in N, from 1")
    present: tuple[tuple[Mode, str, object], ...] = (
        ("reap", "sampling.reap", header.sampling.get("reap")), ("eaft", "sampling.eaft", header.sampling.get("eaft")),
        ("router", "confidence_bins", header.confidence_bins), ("eaft", "eaft", header.eaft),
    )  # fmt: skip
    for mode, field, value in present:
        _require((value is not None) == (mode in header.modes), source, field, value, f"a value exactly if {mode} was collected")
    _require("shadow" not in header.sampling or "router" in header.modes, source, "sampling.shadow", "a number", "none without router")
    if header.eaft is None:
        return
    plane, grid = header.eaft.plane, header.eaft.grid
    for field, edges in (
        ("plane.p_min, p_max", [plane.p_min, plane.p_max]), ("plane.entropy_min, entropy_max", [plane.entropy_min, plane.entropy_max]),
        ("grid.log10_p", grid.log10_p), ("grid.entropy", grid.entropy),
    ):  # fmt: skip
        _require(all(a < b for a, b in itertools.pairwise(edges)), source, f"eaft.{field}", edges, "ascending numbers")


def _require(holds: bool, source: str, field: str, found: object, expected: str) -> None:
    if not holds:
        raise StatisticsError(source, field, found if isinstance(found, str) else shortened(found), expected)


def _raise_first(error: ValidationError, source: str) -> NoReturn:
    """The first complaint of pydantic, in our words."""
    first = error.errors()[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        raise StatisticsError(source, field, "nothing", "this field")
    if first["type"] == "extra_forbidden":
        raise StatisticsError(source, field, "an unknown field", f"the fields of version {VERSION}")
    raise StatisticsError(source, field, shortened(first["input"]), first["msg"].removeprefix("Input should be "))
