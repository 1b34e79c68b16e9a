"""Files that a report is made of: what each is, and what belongs together."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from softprune import mask as mask_file
from softprune.errors import shortened
from softprune.evaluate import evaluation as evaluation_file
from softprune.evaluate.evaluation import MAX_BYTES, Evaluation
from softprune.files import digest_of_file
from softprune.mask import ExpertMask
from softprune.report.documents import Gate, ReportError, Sweep, parsed
from softprune.report.page import Source
from softprune.report.statistics import wanted
from softprune.stats.file import Statistics, read, read_header

KNOWN = "statistics (.safetensors), an evaluation, a gate's result, a sweep (its folder or sweep.json) or a mask"
SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class SweepFolder:
    """A sweep, and the folder that its files lie in."""

    sweep: Sweep
    folder: Path
    source: str


@dataclass
class Given:
    """All files by what they are, each list in the order given.

    Attributes:
        statistics, masks, evaluations, gates, sweeps: name and content.
        sources: every file that was read.
    """

    statistics: list[tuple[str, Statistics]] = field(default_factory=list)
    masks: list[tuple[str, ExpertMask]] = field(default_factory=list)
    evaluations: list[tuple[str, Evaluation]] = field(default_factory=list)
    gates: list[tuple[str, Gate]] = field(default_factory=list)
    sweeps: list[SweepFolder] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def add(self, path: Path) -> str:
        """Read a file or a sweep's folder.

        Returns:
            What it is: "statistics", "mask", "evaluation", "gate" or "sweep".

        Raises:
            InputError: it cannot be read, is none of these, or breaks a rule of its kind.
        """
        if path.is_dir():
            if not (path / SWEEP_FILE).is_file():
                raise ReportError(str(path), "", f"a folder without {SWEEP_FILE}", KNOWN)
            path = path / SWEEP_FILE
        kind = self._statistics(path) if _is_safetensors(path) else self._document(path)
        self.sources.append(Source(path.name, kind, digest_of_file(path)))
        return kind

    def _statistics(self, path: Path) -> str:
        self.statistics.append((path.name, read(path, wanted(read_header(path)))))
        return "statistics"

    def _document(self, path: Path) -> str:
        document, source = _decoded(path), str(path)
        kind = _kind(document)
        if kind == "mask":
            self.masks.append((path.name, ExpertMask.parse(document, source)))
        elif kind == "gate":
            self.gates.append((path.name, parsed(Gate, document, source)))
        elif kind == "sweep":
            self.sweeps.append(SweepFolder(parsed(Sweep, document, source), path.parent, source))
        elif kind == "evaluation":
            self.evaluations.append((path.name, _named(evaluation_file.of(document, source), path)))
        else:
            form = document.get("format") if isinstance(document, dict) else None
            found = "JSON without a known format" if form is None else f"JSON of the format {shortened(form)}"
            raise ReportError(source, "", found, KNOWN)
        return kind


def evaluation_of(path: Path) -> Evaluation:
    """An evaluation's file.

    Raises:
        InputError: it cannot be read, or is none.
    """
    return _named(evaluation_file.read(path), path)


def _named(evaluation: Evaluation, path: Path) -> Evaluation:
    """Under its file's bare name: a page that is passed on should not tell of its maker's folders."""
    return replace(evaluation, source=path.name)


def gate_of(path: Path) -> Gate:
    """The file of a gate's result.

    Raises:
        ReportError: it cannot be read, or is none.
    """
    return parsed(Gate, _decoded(path), str(path))


def _kind(document: Any) -> str | None:
    """What a document says that it is."""
    if not isinstance(document, dict):
        return None
    if "format" not in document:
        return "evaluation" if {"meta", "packs"} <= document.keys() else None
    forms = {mask_file.FORMAT: "mask", "softprune.gate": "gate", "softprune.sweep": "sweep"}
    return forms.get(document["format"]) if isinstance(document["format"], str) else None


def _is_safetensors(path: Path) -> bool:
    """Whether it begins as such files do: the length of a JSON header that lies within the file, and its brace."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8
    except OSError as error:
        raise ReportError(str(path), "", error.strerror or str(error), KNOWN) from None


def _decoded(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ReportError(str(path), "", error.strerror or str(error), KNOWN) from None
    if len(data) > MAX_BYTES:
        raise ReportError(str(path), "", f"over {MAX_BYTES // 1_000_000} MB", f"at most {MAX_BYTES // 1_000_000} MB")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        start = "an empty file" if not data else f"a file that begins with {shortened(data[:12])}"
        raise ReportError(str(path), "", start, KNOWN) from None
