"""What a comparison of two evaluations found, and how it is written."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from softprune.evaluate.bootstrap import Interval
from softprune.evaluate.gates import Check, Gates
from softprune.evaluate.js2d import Js2d

FORMAT: Final = "softprune.gate"
VERSION: Final = 1
Verdict = Literal["PASS", "FAIL", "INCOMPLETE", "INVALID"]
EXIT_CODES: dict[Verdict, int] = {"PASS": 0, "FAIL": 1, "INCOMPLETE": 2, "INVALID": 3}
COLOURS: dict[str, str] = {"PASS": "green", "FAIL": "red", "INCOMPLETE": "yellow", "INVALID": "magenta"}
"""Of verdicts, on a terminal."""


@dataclass(frozen=True)
class Row:
    """One pack at one block length on both sides.

    Attributes:
        pack, seq_len: which.
        primary: whether the gates name it.
        gated: whether its checks count.
        base, candidate: metrics, tokens, and the hash of the blocks where it is known.
        delta: candidate less base, by metric.
        js2d, coarse: of the planes, and of planes of 4 x 4 bins in one.
        enough_tokens: whether raw JS2D says more than its bias.
        checks: against the thresholds.
    """

    pack: str
    seq_len: int
    primary: bool
    gated: bool
    base: dict[str, Any]
    candidate: dict[str, Any]
    delta: dict[str, Interval]
    js2d: Js2d
    coarse: Js2d
    enough_tokens: bool
    checks: list[Check]

    @property
    def passed(self) -> bool | None:
        """Whether every check holds; None if none fails, but one cannot be judged."""
        found = {check.passed for check in self.checks}
        return False if False in found else None if None in found else True

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        coarse = {"coarse" if name == "raw" else f"coarse_{name}": value for name, value in asdict(self.coarse).items()}
        tokens = [int(side["tokens"]) for side in (self.base, self.candidate)]
        js2d = asdict(self.js2d) | coarse | {"tokens": tokens, "enough_tokens": self.enough_tokens}
        return {
            "pack": self.pack, "seq_len": self.seq_len, "primary": self.primary, "gated": self.gated, "passed": self.passed,
            "base": self.base, "candidate": self.candidate, "delta": {name: asdict(value) for name, value in self.delta.items()},
            "js2d": js2d, "checks": [asdict(check) for check in self.checks],
        }  # fmt: skip


@dataclass(frozen=True)
class GateResult:
    """What a comparison found.

    Attributes:
        verdict: see `softprune.evaluate.pair`.
        gates: the thresholds.
        base, candidate: what was compared.
        problems: why it is INVALID or INCOMPLETE, in sentences.
        rows: primary ones first; empty if INVALID.
    """

    verdict: Verdict
    gates: Gates
    base: dict[str, Any]
    candidate: dict[str, Any]
    problems: list[str]
    rows: list[Row]

    @property
    def exit_code(self) -> int:
        """Of `softprune gate`."""
        return EXIT_CODES[self.verdict]

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return {
            "format": FORMAT, "version": VERSION, "date": date, "verdict": self.verdict, "gates": self.gates.model_dump(),
            "base": self.base, "candidate": self.candidate, "problems": self.problems, "rows": [row.document() for row in self.rows],
        }  # fmt: skip

    def dump(self) -> str:
        """The file's text."""
        return json.dumps(self.document(), allow_nan=False, ensure_ascii=False, indent=1) + "\n"
