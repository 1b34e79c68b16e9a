"""Adding statistics of replicas, runs and days.

Tags are united by name, and so are modes: what a file did not collect counts as zero, and every ratio has a count of its own.
Refused is what would not be a sum of like things: other weights, another mask, grid or sampling, or a run that is in two files.

Counts add exactly. Sums of floats are multiples of a quantum (`softprune.stats.layout`), so they do too, and any order and any
grouping of the same files gives the same bytes, header included; beyond 2**53 quanta in one cell, sums agree to their last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from softprune.errors import shortened
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics, read_by_tag, read_header
from softprune.stats.header import DEFAULT_TAG, MODES, DataSet, Header, Tokens

Progress = Callable[[str, int], None]
"""Called as (file name, bytes read) after each file."""


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Add statistics.

    Raises:
        StatisticsError: they do not fit together, or there are none.
    """
    total = Statistics.zeros(merged_header([(part.source, part.header) for part in parts]))
    for part in parts:
        for name, values in part.tensors.items():
            for tag, row in zip(part.header.tags, values, strict=True):
                total.tensors[name][total.header.tags.index(tag)] += row
    return total


def merge_files(paths: Sequence[str | Path], progress: Progress | None = None) -> Statistics:
    """Add files one after another: memory for the sum and for one tag of one file.

    Every header is compared before the first tensor is read.

    Raises:
        StatisticsError: a file cannot be read, or does not fit the others.
    """
    headers = [(str(path), read_header(path)) for path in paths]
    total = Statistics.zeros(merged_header(headers))
    for path, (source, header) in zip(paths, headers, strict=True):
        for tag, tensors in read_by_tag(path, header):
            at = total.header.tags.index(tag)
            for name, values in tensors.items():
                total.tensors[name][at] += values[0]
        if progress:
            progress(source, Path(path).stat().st_size)
    return total


def merged_header(headers: Sequence[tuple[str, Header]]) -> Header:
    """The header of the sum; lists that are sets are sorted, so that the order of the parts leaves no trace.

    Args:
        headers: each with its file's name.

    Raises:
        StatisticsError: two do not fit together; it names both files, the field and its values.
    """
    if not headers:
        raise StatisticsError("merge", "", "no files", "at least one")
    first_source, first = headers[0]
    owners: dict[str, str] = {}
    # First value seen of what only some modes have, and the file that has it.
    known: dict[str, tuple[Any, str]] = {}
    for source, header in headers:
        for field in ("architecture", "num_layers", "num_experts", "top_k", "fingerprint"):
            _same(source, f"model.{field}", getattr(header.model, field), getattr(first.model, field), first_source)
        _same(source, "epochs[0].mask", header.mask, first.mask, first_source)
        for field in ("num_kept", "top_k"):
            _same(source, f"epochs[0].{field}", getattr(header.epochs[0], field), getattr(first.epochs[0], field), first_source)
        for run in header.runs:
            if run.id in owners:
                raise StatisticsError(source, "runs", f"run {run.id}, which is in {owners[run.id]} too", "each run in one of the files")
            owners[run.id] = source
        own: dict[str, Any] = {f"sampling.{name}": value for name, value in header.sampling.items()}
        own |= {} if header.confidence_bins is None else {"confidence_bins": header.confidence_bins}
        if header.eaft is not None:
            own |= {f"eaft.{name}": getattr(header.eaft, name) for name in ("attribution", "plane", "grid")}
        for field, value in own.items():
            before, owner = known.setdefault(field, (value, source))
            _same(source, field, value, before, owner)
    every = [header for _, header in headers]
    tags = {tag for header in every for tag in header.tags}
    return Header(
        model=first.model,
        runs=sorted((run for header in every for run in header.runs), key=lambda run: run.id),
        epochs=sorted((epoch for header in every for epoch in header.epochs), key=lambda epoch: (epoch.run, epoch.epoch)),
        tags=[DEFAULT_TAG, *sorted(tags - {DEFAULT_TAG})],
        modes=[mode for mode in MODES if any(mode in header.modes for header in every)],
        tokens={tag: _tokens(header.tokens[tag] for header in every if tag in header.tokens) for tag in sorted(tags)},
        sampling={name: value for header in every for name, value in header.sampling.items()},
        confidence_bins=next((header.confidence_bins for header in every if header.confidence_bins is not None), None),
        eaft=next((header.eaft for header in every if header.eaft is not None), None),
        data_sets=_data_sets(data_set for header in every for data_set in header.data_sets),
    )


def _same(source: str, field: str, found: object, expected: object, owner: str) -> None:
    if found != expected:
        raise StatisticsError(source, field, shortened(found), f"{shortened(expected)}, as in {owner}; unlike things do not add up")


def _tokens(parts: Iterable[Tokens]) -> Tokens:
    listed = list(parts)
    return Tokens(
        prefill=sum(part.prefill for part in listed), decode=sum(part.decode for part in listed), cached=sum(part.cached for part in listed)
    )


def _data_sets(parts: Iterable[DataSet]) -> list[DataSet]:
    hashes: dict[str, set[str]] = {}
    for part in parts:
        hashes.setdefault(part.id, set()).update(part.hashes)
    return [DataSet(id=name, hashes=sorted(hashes[name])) for name in sorted(hashes)]
