"""The evaluation file: the study's JSON (spec/metrics.md 1.7), with our own things under keys named "softprune".

The study's own files, which have no such keys, are read as well; they have no sums by block, and so no intervals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from softprune.errors import shortened
from softprune.evaluate.errors import EvaluationFileError
from softprune.evaluate.fields import Fields
from softprune.evaluate.plane import Plane, decode_cells
from softprune.files import write_whole

FORMAT: Final = "softprune.evaluation"
VERSION: Final = 1
MAX_BYTES = 512_000_000
"""Largest file that is read (512 MB, decimal)."""
METRICS = ("ppl", "mean_nll", "mean_prob", "mean_entropy", "cc_rate", "x_thr", "h_thr")
_SUMS = ("nll", "p", "entropy")
# Sums in another order differ in their last places only.
_SAME = 1e-6


@dataclass(frozen=True, eq=False)
class BlockSums:
    """What intervals are made of.

    Attributes:
        tokens: int64 [num_blocks], completion tokens of each block.
        nll, p, entropy: float64 [num_blocks], sums over them.
        cells: uint16 [sum of tokens], flat cell index of each token, block after block.
    """

    tokens: NDArray[np.int64]
    nll: NDArray[np.float64]
    p: NDArray[np.float64]
    entropy: NDArray[np.float64]
    cells: NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Cell:
    """One pack at one block length.

    Attributes:
        pack, seq_len: which.
        identity: what says which data was seen: rows_seen, rows_sha256, num_blocks, blocks_sha256; None where the file doesn't say.
        metrics: the numbers of `METRICS`.
        tokens: completion tokens.
        counts: int64 [xbins, ybins].
        blocks: None in the study's files.
    """

    pack: str
    seq_len: int
    identity: Mapping[str, Any]
    metrics: Mapping[str, float]
    tokens: int
    counts: NDArray[np.int64]
    blocks: BlockSums | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A file that was read and checked.

    Attributes:
        source: its name, for errors.
        meta: as it stands in the file.
        plane: the axes of all its planes.
        cells: by (pack, seq_len), in the file's order.
    """

    source: str
    meta: Mapping[str, Any]
    plane: Plane
    cells: Mapping[tuple[str, int], Cell]

    @property
    def own(self) -> Mapping[str, Any]:
        """`meta.softprune`; empty in the study's files."""
        return self.meta.get("softprune") or {}

    @property
    def label(self) -> str:
        """What the file calls its model."""
        return str(self.meta["model_id"])

    def cell(self, pack: str, seq_len: int) -> Cell:
        """One of the cells.

        Raises:
            EvaluationFileError: the file has no such one.
        """
        try:
            return self.cells[pack, seq_len]
        except KeyError:
            there = ", ".join(f"{name}@{length}" for name, length in self.cells)
            raise EvaluationFileError(self.source, "packs", there, f"{pack}@{seq_len} among them") from None


def read(path: str | Path) -> Evaluation:
    """Read and check a file.

    Raises:
        EvaluationFileError: missing, no evaluation, NaN, a metric missing, or sizes that don't fit together.
    """
    source = str(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise EvaluationFileError(source, "", error.strerror or str(error), "an evaluation file") from None
    if len(data) > MAX_BYTES:
        raise EvaluationFileError(source, "", f"over {MAX_BYTES // 1_000_000} MB", f"at most {MAX_BYTES // 1_000_000} MB")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EvaluationFileError(source, "", f"no valid JSON ({error})", "an evaluation file") from None
    return of(document, source)


def write(document: Mapping[str, Any], path: str | Path) -> None:
    """Check a document and write it, whole or not at all.

    Raises:
        EvaluationFileError: as `read`.
    """
    of(document, str(path))
    write_whole(Path(path), json.dumps(document, allow_nan=False, ensure_ascii=False) + "\n")


def of(document: Any, source: str) -> Evaluation:
    """Check the decoded JSON of a file.

    Args:
        document: what stands in it.
        source: the file's name.

    Raises:
        EvaluationFileError: as `read`.
    """
    return _Reader(source, EvaluationFileError).evaluation(document)


class _Reader(Fields):
    """The rules of the file."""

    def evaluation(self, document: Any) -> Evaluation:
        meta = self.get(self.typed(document, "", dict), "meta", "", dict)
        if (own := meta.get("softprune")) is not None:
            self._own(own)
        for name, kind in (("model_id", str), ("entropy_topk", int), ("num_blocks", int), ("seq_lens", list)):
            self.get(meta, name, "meta", kind)
        self.number(meta, "cc_quantile", "meta")
        plane = self._plane(meta)
        cells: dict[tuple[str, int], Cell] = {}
        for i, pack in enumerate(self.get(document, "packs", "", list)):
            at = f"packs[{i}]"
            name, lengths = self.get(self.typed(pack, at, dict), "pack", at, str), self.get(pack, "seq", at, dict)
            for length, cell in lengths.items():
                field = f"{at}.seq.{length}"
                if not (length.isascii() and length.isdecimal()):
                    self.fail(f"{at}.seq", shortened(length), "a block length")
                if (name, int(length)) in cells:
                    self.fail(field, f"{name}@{length} a second time", "each pack and block length once")
                cells[name, int(length)] = self._cell(name, int(length), self.typed(cell, field, dict), field, plane, own is not None)
        if not cells:
            self.fail("packs", "none", "at least one pack at one block length")
        return Evaluation(self.source, meta, plane, cells)

    def _own(self, own: Any) -> None:
        at = "meta.softprune"
        if (found := self.get(self.typed(own, at, dict), "format", at, str)) != FORMAT:
            self.fail(f"{at}.format", shortened(found), f'"{FORMAT}"')
        if (number := self.get(own, "version", at, int)) != VERSION:
            self.fail(f"{at}.version", shortened(number), f"{VERSION}, the only one that this softprune reads")
        if (form := self.get(own, "block_form", at, str)) not in ("L", "L+1"):
            self.fail(f"{at}.block_form", shortened(form), "L or L+1")
        self.get(own, "tokenizer_sha256", at, str)

    def _plane(self, meta: Mapping[str, Any]) -> Plane:
        bins = [self.get(meta, name, "meta", int) for name in ("hist_xbins", "hist_ybins")]
        if min(bins) < 1 or bins[0] * bins[1] > 1 << 16:
            self.fail("meta.hist_xbins", f"{bins[0]} x {bins[1]} bins", "from 1 to 65536 cells")
        if (scale := self.get(meta, "prob_scale", "meta", str)) not in ("linear", "log"):
            self.fail("meta.prob_scale", shortened(scale), "linear or log")
        if scale == "linear":
            return Plane(bins[0], bins[1])
        low, high = (self.number(meta, name, "meta") for name in ("logp_min", "logp_max"))
        if not low < high:
            self.fail("meta.logp_min", f"{low}, with logp_max = {high}", "less than logp_max")
        return Plane(bins[0], bins[1], "log", low, high)

    def _cell(self, pack: str, seq_len: int, cell: Mapping[str, Any], at: str, plane: Plane, ours: bool) -> Cell:
        self.get(cell, "rows_seen", at, int)
        self.get(cell, "rows_sha256", at, str)
        if ours:
            self.get(cell, "blocks_sha256", at, str)
        identity = {name: cell.get(name) for name in ("rows_seen", "rows_sha256", "num_blocks", "blocks_sha256")}
        model, field = self.get(cell, "model", at, dict), f"{at}.model"
        metrics = {name: self.number(model, name, field) for name in METRICS}
        if (tokens := self.get(model, "kept_tokens", field, int)) < 1:
            self.fail(f"{field}.kept_tokens", str(tokens), "at least one completion token")
        counts = self._counts(self.get(model, "hist2d_x_H", field, dict), f"{field}.hist2d_x_H", plane, tokens)
        for name, marginal in (("hist1d_x", counts.sum(1)), ("hist1d_H", counts.sum(0))):
            found = self.integers(self.get(model, name, field, dict), "counts", f"{field}.{name}", len(marginal))
            if (found != marginal).any():
                self.fail(f"{field}.{name}.counts", "other numbers", "the sums of hist2d_x_H")
        blocks = None
        if ours:
            own = self.get(self.get(model, "softprune", field, dict), "blocks", f"{field}.softprune", dict)
            number = self.get(cell, "num_blocks", at, int)
            blocks = self._blocks(own, f"{field}.softprune.blocks", number, counts, metrics)
        return Cell(pack, seq_len, identity, metrics, tokens, counts, blocks)

    def _counts(self, plane_of_file: Mapping[str, Any], at: str, plane: Plane, tokens: int) -> NDArray[np.int64]:
        for name, edges in (("x_edges", plane.x_edges), ("y_edges", plane.y_edges)):
            if name in plane_of_file:
                found = self.floats(plane_of_file, name, at, len(edges))
                if not np.allclose(found, edges, rtol=0, atol=_SAME):
                    self.fail(f"{at}.{name}", "other edges", f"{len(edges) - 1} equal bins from {edges[0]:g} to {edges[-1]:g}")
        counts = self.integers(plane_of_file, "counts", at, plane.xbins * plane.ybins).reshape(plane.xbins, plane.ybins)
        if counts.sum() != tokens:
            self.fail(f"{at}.counts", f"{counts.sum()} tokens", f"kept_tokens = {tokens}")
        return counts

    def _blocks(
        self, own: Mapping[str, Any], at: str, num_blocks: int, counts: NDArray[np.int64], metrics: Mapping[str, float]
    ) -> BlockSums:
        tokens = self.integers(own, "tokens", at, num_blocks)
        if tokens.sum() != counts.sum():
            self.fail(f"{at}.tokens", f"{tokens.sum()} in all", f"kept_tokens = {counts.sum()}")
        sums = {name: self.floats(own, name, at, num_blocks) for name in _SUMS}
        for name, metric in zip(_SUMS, ("mean_nll", "mean_prob", "mean_entropy"), strict=True):
            mean = float(sums[name].sum()) / int(tokens.sum())
            if not math.isclose(mean, metrics[metric], rel_tol=_SAME, abs_tol=_SAME):
                self.fail(f"{at}.{name}", f"{mean:.9g} a token", f"{metric} = {metrics[metric]:.9g}")
        try:
            cells = decode_cells(self.get(own, "cells", at, str), int(tokens.sum()))
        except ValueError as error:
            self.fail(f"{at}.cells", str(error), "the cell of each token")
        if not np.array_equal(np.bincount(cells, minlength=counts.size), counts.reshape(-1)):
            self.fail(f"{at}.cells", "cells of other tokens", "those that hist2d_x_H counts")
        return BlockSums(tokens, sums["nll"], sums["p"], sums["entropy"], cells)
