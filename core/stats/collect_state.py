"""What `softprune stats collect` keeps beside its output while it is under way, so that it can go on after an interruption.

The folder OUT.parts holds `state.json` and a statistics file for each part that was drained. Parts share no block and no run, so they
can be read, shown and merged as they are; all of them together are the whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softprune.errors import shortened
from softprune.files import write_whole
from softprune.stats.errors import StatisticsError
from softprune.stats.header import Mode

FORMAT: Final = "softprune.collect-state"
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class PackAsked(BaseModel):
    """A pack and the blocks made of it; `sha256` is over the blocks' hashes, so it stands for texts, tokenizer and sizes."""

    model_config = _STRICT

    tag: str
    num_blocks: int
    sha256: str


class Asked(BaseModel):
    """A collection; one that goes on has to be the same. The server's address is not in it.

    Attributes:
        fingerprint, mask: of the model that is served, and hash of the mask in force.
        mode, sample, attribution: as `POST stats/start` takes them; None leaves it to the server.
        seq_len: tokens in a block.
        packs: in the order in which they take turns.
    """

    model_config = _STRICT

    fingerprint: str
    mask: str | None
    mode: Mode
    sample: int | None
    attribution: str | None
    seq_len: int
    packs: list[PackAsked]


class Part(BaseModel):
    """A drained part.

    Attributes:
        file: its name.
        first, stop: the blocks [first, stop) in the order of sending.
        runs: those in it.
        lost_samples: tokens that were to be sampled, and could not be.
    """

    model_config = _STRICT

    file: str
    first: int
    stop: int
    runs: list[str]
    lost_samples: int


class State(BaseModel):
    """`state.json`.

    Attributes:
        asked: see `Asked`.
        parts: what was drained, in order and without gaps.
        run: of the part under way; "" while it is being started, None between two parts.
    """

    model_config = _STRICT

    format: Literal["softprune.collect-state"] = FORMAT
    version: Literal[1] = 1
    asked: Asked
    parts: list[Part] = Field(default_factory=list)
    run: str | None = None

    @property
    def done(self) -> int:
        """Blocks that were drained."""
        return self.parts[-1].stop if self.parts else 0

    @property
    def runs(self) -> set[str]:
        """Runs of this collection, drained or under way."""
        return {*(run for part in self.parts for run in part.runs), *([self.run] if self.run else [])}


class StateFolder:
    """OUT.parts.

    Args:
        out: the collection's output.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(out.name + ".parts")
        self.file = self.path / "state.json"

    def begin(self, asked: Asked) -> State:
        """The state of an interrupted collection, or of a new one.

        Raises:
            StatisticsError: what lies there is of another collection, or unreadable.
        """
        if not self.file.exists():
            if self.path.exists():
                raise StatisticsError(str(self.path), "", f"something without {self.file.name} in it", "nothing: move it away")
            return State(asked=asked)
        try:
            state = State.model_validate_json(self.file.read_bytes())
        except (OSError, ValidationError) as error:
            raise StatisticsError(str(self.file), "", f"no state of a collection ({shortened(str(error))})", "one, or no file") from None
        for field in Asked.model_fields:
            found, expected = getattr(state.asked, field), getattr(asked, field)
            if found != expected:
                again = f"{shortened(expected)} to go on; to begin anew, move {self.path} away"
                raise StatisticsError(str(self.file), field, shortened(found), again)
        return state

    def save(self, state: State) -> State:
        """Write the state.

        Raises:
            StatisticsError: it cannot be written.
        """
        try:
            self.path.mkdir(exist_ok=True)
            write_whole(self.file, state.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise StatisticsError(str(self.path), "", error.strerror or str(error), "a folder that can be written") from None
        return state

    def part(self, number: int) -> Path:
        """File of the part with this number, from 1."""
        return self.path / f"{number:04}.safetensors"

    def files(self, state: State) -> list[Path]:
        """Of all parts."""
        return [self.path / part.file for part in state.parts]

    def remove(self) -> None:
        """Once the output is written."""
        shutil.rmtree(self.path)
