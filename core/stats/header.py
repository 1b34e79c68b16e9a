"""The header of a statistics file: what was counted, on which model, under which mask, by which runs.

Everything that a merge has to compare, and every size that a tensor's shape depends on, stands here; `softprune.stats.header_rules` reads
and checks it.
"""

from __future__ import annotations

import json
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from softprune.mask import ExpertMask, MaskModel

FORMAT: Final = "softprune.statistics"
VERSION: Final = 1
DEFAULT_TAG: Final = "default"
"""The tag of requests that name none; every file has it, first."""
MAX_TAG_LENGTH = 128
"""Characters of a tag."""

Mode = Literal["router", "reap", "eaft"]
Sampled = Literal["reap", "eaft", "shadow"]
Entropy = Literal["full", "top20"]
MODES: tuple[Mode, ...] = ("router", "reap", "eaft")
PHASES = ("prefill", "decode")
"""Index of the phase axis."""
KINDS = ("teacher_forced", "sampled")
"""Index of the kind axis: p of a given token, and p of the token that was drawn. Never added to each other."""

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
_UTC = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"
_HASH = r"^[a-z0-9-]+:[0-9a-f]{16,128}$"


class Run(BaseModel):
    """One collection by one server: from a start, or a switch of masks, to what was last drained.

    Attributes:
        id: unique; a run that is in two files would be counted twice, so these do not merge.
        engine, engine_version: e.g. "vLLM", "0.32.0".
        started, ended: UTC, ISO 8601 with a Z.
        modes: what it collected.
        sampled: per mode, in words, which tokens could be sampled, e.g. {"reap": "tokens of prefill"}.
    """

    model_config = _STRICT

    id: str = Field(pattern=r"^[!-~]{1,128}$")
    engine: str
    engine_version: str
    started: str = Field(pattern=_UTC)
    ended: str = Field(pattern=_UTC)
    modes: list[Mode] = Field(min_length=1)
    sampled: dict[Sampled, str] = Field(default_factory=dict)


class MaskEpoch(BaseModel):
    """A time in which a run's server had one mask.

    Tensors have no axis for it, so all epochs of a file have the same mask; the collector begins another run at a switch.

    Attributes:
        run, epoch: the run's id, and its server's number.
        mask: `ExpertMask.hash`, or None for the unpruned router.
        num_kept, top_k: per MoE layer, experts kept and experts per token.
    """

    model_config = _STRICT

    run: str
    epoch: int = Field(ge=0)
    mask: str | None = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    num_kept: list[int]
    top_k: list[int]

    @classmethod
    def of(cls, run: str, epoch: int, mask: ExpertMask | None, model: MaskModel) -> MaskEpoch:
        """The epoch of a mask, or of none."""
        layers = range(model.num_layers)
        if mask is None:
            kept, top_k = [model.num_experts for _ in layers], [model.top_k for _ in layers]
            return cls(run=run, epoch=epoch, mask=None, num_kept=kept, top_k=top_k)
        return cls(run=run, epoch=epoch, mask=mask.hash, num_kept=mask.num_kept, top_k=[mask.layer_top_k(layer) for layer in layers])


class Tokens(BaseModel):
    """Tokens of one tag: routed in prefill, routed in decode, and prompt tokens that the prefix cache answered (not routed again)."""

    model_config = _STRICT

    prefill: int = Field(ge=0)
    decode: int = Field(ge=0)
    cached: int = Field(ge=0)

    @property
    def routed(self) -> int:
        """Tokens that went through the routers."""
        return self.prefill + self.decode


class Plane(BaseModel):
    """Axes of `eaft.hist`: 160 uniform bins of p (or log10 p) by 120 of H; what lies outside is counted in the outermost bin.

    Attributes:
        p_scale, p_min, p_max: what the first axis shows, and its ends.
        entropy, entropy_min, entropy_max: the second; "top20" is H of the 20 likeliest over ln 20, "full" is that of all in nats.
    """

    model_config = _STRICT

    p_scale: Literal["linear", "log10"] = "linear"
    p_min: float = 0.0
    p_max: float = 1.0
    entropy: Entropy = "top20"
    entropy_min: float = 0.0
    entropy_max: float = 1.0


class Grid(BaseModel):
    """Axes of `eaft.grid_…`: edges of X bins of log10 p and Y bins of H, ascending; the outermost bins take what lies outside."""

    model_config = _STRICT

    log10_p: list[float] = Field(min_length=2, max_length=257)
    entropy: list[float] = Field(min_length=2, max_length=257)
    entropy_form: Entropy = "top20"


class Eaft(BaseModel):
    """How `eaft` was collected.

    `attribution` says whose activations a token's p and H are counted with: "predictor" those that made the prediction,
    "target" those at the token itself, as the study did.
    """

    model_config = _STRICT

    attribution: Literal["predictor", "target"] = "predictor"
    plane: Plane
    grid: Grid


class DataSet(BaseModel):
    """A pack that was replayed: its name, and the hashes of its prompts ("sha256:…" or another algorithm's), as `collect` made them."""

    model_config = _STRICT

    id: str = Field(min_length=1, max_length=256)
    hashes: list[Annotated[str, Field(pattern=_HASH)]]


class Header(BaseModel):
    """Everything in the file but the tensors.

    Attributes:
        model: as in a mask file; its fingerprint is required.
        runs, epochs: see `Run`, `MaskEpoch`.
        tags: names of the tag axis; "default" first.
        modes: what the runs collected together; a mode that none collected has no tensors.
        tokens: per tag.
        sampling: N where 1 token in N was sampled; "shadow" only where shadow counts were collected.
        confidence_bins: uniform bins of the top-1 gate on [0, 1]; None without `router`.
        eaft: None without `eaft`.
        data_sets: packs that were replayed; [] for live traffic.
    """

    model_config = _STRICT

    format: Literal["softprune.statistics"] = FORMAT
    version: Literal[1] = VERSION
    model: MaskModel
    runs: list[Run] = Field(min_length=1)
    epochs: list[MaskEpoch] = Field(min_length=1)
    tags: list[str]
    modes: list[Mode]
    tokens: dict[str, Tokens]
    sampling: dict[Sampled, int] = Field(default_factory=dict)
    confidence_bins: int | None = Field(default=None, ge=1, le=10_000)
    eaft: Eaft | None = None
    data_sets: list[DataSet] = Field(default_factory=list)

    def dump(self) -> str:
        """The JSON, the same for equal headers."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))

    @property
    def mask(self) -> str | None:
        """Hash of the mask under which all of it was counted; None for the unpruned router."""
        return self.epochs[0].mask
