"""What an evaluation keeps beside its output while it is under way: OUT.parts with `state.json`, which says what is evaluated, and
`scores.bin`, which gets a record for each block as its scores arrive, in whatever order that is.

A record is little-endian: number of the block (uint32), its completion tokens n (uint32), seconds (float32), log p and H (float32 [n]
each), and the CRC-32 of all that. Whatever is torn at the end is dropped when the evaluation goes on.
"""

from __future__ import annotations

import os
import shutil
import struct
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from softprune.errors import shortened
from softprune.evaluate.errors import EvaluationFileError
from softprune.evaluate.prompt_scores import TokenScores
from softprune.files import write_whole

FORMAT: Final = "softprune.evaluation-state"
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
_HEAD, _TAIL = struct.Struct("<IIf"), struct.Struct("<I")


class CellAsked(BaseModel):
    """One pack at one block length; `blocks_sha256` is over the blocks' hashes, so it stands for texts, tokenizer and sizes."""

    model_config = _STRICT

    pack: str
    seq_len: int
    blocks_sha256: str


class Asked(BaseModel):
    """An evaluation; one that goes on has to be the same. The server's address is not in it.

    Attributes:
        engine: with its version.
        model: the name under which it is served.
        fingerprint, mask, top_k: what is served, as far as softprune says.
        path, tokenizer: last parts of theirs.
        context, computes: see `Served`.
        entropy_topk: tokens that H is of.
        block_form: L or L+1.
        order: seed of the order in which blocks are sent; None for the packs' own.
        cells: in order.
    """

    model_config = _STRICT

    engine: str
    model: str
    fingerprint: str | None
    mask: str | None
    top_k: int | None
    path: str
    tokenizer: str
    context: int | None
    computes: dict[str, str]
    entropy_topk: int
    block_form: Literal["L", "L+1"]
    order: int | None
    cells: list[CellAsked]


class _State(BaseModel):
    model_config = _STRICT

    format: Literal["softprune.evaluation-state"] = FORMAT
    version: Literal[1] = 1
    asked: Asked


class ScoreStore:
    """OUT.parts of one evaluation; a context manager. Blocks may be added from several threads.

    Args:
        out: the evaluation's output.
        asked: see `Asked`.
        tokens: completion tokens of each block.

    Raises:
        EvaluationFileError: what lies there is of another evaluation, or cannot be read or written.
    """

    def __init__(self, out: Path, asked: Asked, tokens: Sequence[int]) -> None:
        self.path = out.with_name(out.name + ".parts")
        self._tokens, self._lock = tokens, threading.Lock()
        self._place = np.full(len(tokens), -1, np.int64)
        try:
            self._begin(asked)
            (self.path / "scores.bin").touch()
            self._file: IO[bytes] = open(self.path / "scores.bin", "r+b", buffering=0)  # noqa: SIM115 - closed by __exit__
            self._end = self._scan()
        except OSError as error:
            raise EvaluationFileError(str(self.path), "", error.strerror or str(error), "a folder that can be written") from None

    def __enter__(self) -> ScoreStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def missing(self) -> list[int]:
        """Blocks without scores, in order."""
        return [int(number) for number in np.flatnonzero(self._place < 0)]

    @property
    def present(self) -> list[int]:
        """Blocks with scores, in order."""
        return [int(number) for number in np.flatnonzero(self._place >= 0)]

    def add(self, number: int, scores: TokenScores, seconds: float) -> None:
        """Keep a block's scores.

        Raises:
            EvaluationFileError: they cannot be written.
        """
        head = _HEAD.pack(number, len(scores.log_p), seconds)
        data = head + scores.log_p.astype("<f4").tobytes() + scores.entropy.astype("<f4").tobytes()
        data += _TAIL.pack(zlib.crc32(data))
        with self._lock:
            try:
                written = os.pwrite(self._file.fileno(), data, self._end)
            except OSError as error:
                raise EvaluationFileError(self._file.name, "", error.strerror or str(error), "room for scores") from None
            if written < len(data):
                raise EvaluationFileError(self._file.name, "", f"{written} of {len(data)} bytes written", "room for scores")
            self._place[number], self._end = self._end, self._end + len(data)

    def get(self, number: int) -> tuple[TokenScores, float]:
        """A block's scores, and its seconds.

        Raises:
            EvaluationFileError: the file was changed meanwhile.
        """
        found = self._record(int(self._place[number]))
        if found is None or found[0] != number:
            raise EvaluationFileError(self._file.name, f"block {number}", "other bytes than were written", "nobody else writing there")
        return found[1], found[2]

    def remove(self) -> None:
        """Once the output is written."""
        self._file.close()
        shutil.rmtree(self.path)

    def _begin(self, asked: Asked) -> None:
        file = self.path / "state.json"
        if not file.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise EvaluationFileError(str(self.path), "", f"something without {file.name} in it", "nothing: move it away")
            self.path.mkdir(exist_ok=True)
            write_whole(file, _State(asked=asked).model_dump_json(indent=1) + "\n")
            return
        try:
            state = _State.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise EvaluationFileError(str(file), "", f"no state of an evaluation ({shortened(str(error))})", "one, or no file") from None
        for field in Asked.model_fields:
            found, expected = getattr(state.asked, field), getattr(asked, field)
            if found != expected:
                again = f"{shortened(expected)} to go on; to begin anew, move {self.path} away"
                raise EvaluationFileError(str(file), field, shortened(found), again)

    def _scan(self) -> int:
        """Find the whole records, and cut off what follows them; the file's end."""
        place = 0
        while (found := self._record(place)) is not None:
            self._place[found[0]] = place
            place += _size(self._tokens[found[0]])
        self._file.truncate(place)
        return place

    def _record(self, place: int) -> tuple[int, TokenScores, float] | None:
        """The record at a place: number of the block, scores, seconds; None if there is no whole one."""
        head = os.pread(self._file.fileno(), _HEAD.size, place) if place >= 0 else b""
        if len(head) < _HEAD.size:
            return None
        number, count, seconds = _HEAD.unpack(head)
        if number >= len(self._tokens) or count != self._tokens[number]:
            return None
        data = os.pread(self._file.fileno(), _size(count), place)
        if len(data) < _size(count) or _TAIL.pack(zlib.crc32(data[: -_TAIL.size])) != data[-_TAIL.size :]:
            return None
        values: NDArray[np.float32] = np.frombuffer(data, "<f4", 2 * count, _HEAD.size).astype(np.float32)
        return number, TokenScores(values[:count], values[count:]), seconds


def _size(tokens: int) -> int:
    return _HEAD.size + 8 * tokens + _TAIL.size
