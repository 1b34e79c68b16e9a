"""The JSON documents that a report reads besides evaluations and masks: the result of a gate, and a sweep."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softprune.errors import InputError, shortened

Verdict = Literal["PASS", "FAIL", "INCOMPLETE", "INVALID"]
_READ = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class ReportError(InputError):
    """A file that no report can be made of, or that does not go with another."""


class Delta(BaseModel):
    """Candidate less base, and its 95 % interval; None where there is none."""

    model_config = _READ

    value: float | None
    low: float | None = None
    high: float | None = None


class Side(BaseModel):
    """What a gate compared."""

    model_config = _READ

    label: str
    file: str | None = None
    fingerprint: str | None = None
    mask: str | None = None
    num_kept: list[int] | None = None
    top_k: int | list[int] | None = None


class Values(BaseModel):
    """Metrics of one side on one pack and block length."""

    model_config = _READ

    ppl: float
    mean_prob: float
    mean_entropy: float
    cc_rate: float
    tokens: int
    cc_rate_base_thr: float | None = None
    blocks_sha256: str | None = None


class Deltas(BaseModel):
    """Differences of the metrics."""

    model_config = _READ

    ppl: Delta
    rel_ppl: Delta
    mean_prob: Delta
    mean_entropy: Delta
    cc_rate: Delta
    cc_rate_base_thr: Delta


class Js2d(BaseModel):
    """JS2D of the planes, nats."""

    model_config = _READ

    raw: float
    bias: float
    corrected: float
    low: float | None = None
    high: float | None = None
    coarse: float
    coarse_bias: float
    coarse_corrected: float | None = None
    coarse_low: float | None = None
    coarse_high: float | None = None
    occupied_cells: int
    enough_tokens: bool


class Check(BaseModel):
    """One threshold; `note` says which form of the limit or the value it is, or why nobody can tell whether it passed."""

    model_config = _READ

    metric: str
    value: float | None
    limit: float
    passed: bool | None
    note: str = ""


class Row(BaseModel):
    """One pack at one block length."""

    model_config = _READ

    pack: str
    seq_len: int
    primary: bool
    gated: bool | None = None
    base: Values
    candidate: Values
    delta: Deltas
    js2d: Js2d
    checks: list[Check]

    @property
    def name(self) -> str:
        """E.g. "UNION@1024"."""
        return f"{self.pack}@{self.seq_len}"

    @property
    def judged(self) -> bool:
        """Whether the verdict rests on it."""
        return self.primary if self.gated is None else self.gated


class Thresholds(BaseModel):
    """The file of thresholds, as far as a report names it."""

    model_config = _READ

    name: str = "thresholds"


class Gate(BaseModel):
    """What `softprune gate` wrote."""

    model_config = _READ

    format: Literal["softprune.gate"]
    version: Literal[1]
    date: str | None = None
    verdict: Verdict
    gates: Thresholds
    base: Side
    candidate: Side
    problems: list[str] = Field(default_factory=list)
    rows: list[Row] = Field(default_factory=list)

    @property
    def primary(self) -> Row | None:
        """The first row that the verdict rests on, else the first."""
        return next((row for row in self.rows if row.primary), self.rows[0] if self.rows else None)


class Decode(BaseModel):
    """Decode speed of a cell, and its ratio to the base's."""

    model_config = _READ

    batch: int
    tok_s: float
    over_base: float
    low: float | None = None
    high: float | None = None


class SweepCell(BaseModel):
    """One mask of a sweep."""

    model_config = _READ

    label: str
    method: str | None = None
    keep: int | None = None
    seed: int | None = None
    data_seed: int | None = None
    top_k: int | None = None
    mask: str | None = None
    mask_hash: str | None = None
    base: str | None = None
    evaluation: str | None = None
    gate: str | None = None
    verdict: Verdict | None = None
    ppl: dict[str, float] = Field(default_factory=dict)
    rel_ppl: float | None = None
    decode: Decode | None = None
    pareto: bool = False

    @property
    def title(self) -> str:
        """Its label, and the seed of the data where that was drawn."""
        return self.label if self.data_seed is None else f"{self.label}, data {self.data_seed}"


class Sweep(BaseModel):
    """What `softprune sweep` wrote."""

    model_config = _READ

    format: Literal["softprune.sweep"]
    version: Literal[1]
    date: str | None = None
    softprune_version: str | None = None
    engine: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    base: str | None = None
    cells: list[SweepCell]
    error: str | None = None


Document = TypeVar("Document", bound=BaseModel)


def parsed(kind: type[Document], data: object, source: str) -> Document:
    """A document from decoded JSON.

    Raises:
        ReportError: a field is missing or of another type; names the field.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        found = "nothing" if first["type"] == "missing" else shortened(first["input"])
        raise ReportError(source, field, found, first["msg"][0].lower() + first["msg"][1:]) from None
