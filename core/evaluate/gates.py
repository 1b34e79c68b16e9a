"""Gates: how far a candidate's metrics may lie from the base's, as data, and the check of one row against them (spec/metrics.md 2).

All limits but that of JS2D hold on both sides: a perplexity that falls by more than the limit fails as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softprune.errors import shortened
from softprune.evaluate.errors import GatesError

FORMAT: Final = "softprune.gates"
VERSION: Final = 1
NEAR_LOSSLESS = "near-lossless-v1"
_SHIPPED = Path(__file__).parent / "gates"

Limit = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PplRule = Literal["min", "max"]
CcThresholds = Literal["base", "own"]
GatePacks = Literal["primary", "all"]


class Gates(BaseModel):
    """Thresholds. Each of them has to be given: one that is missing would be a gate that nobody set.

    Attributes:
        name: of the set.
        max_abs_delta_ppl, max_rel_delta_ppl: of the perplexity, and of its share of the base's.
        max_abs_delta_cc_rate: of the share of confident conflicts.
        max_abs_delta_mean_prob: of the mean probability.
        max_js2d: of the planes' divergence, nats.
        primary_pack, primary_seq_lens: the rows that must be there, and that are judged.
        ppl_rule: "min", both limits of the perplexity hold; "max", the wider one does.
        cc_thresholds: "base", confident conflicts are counted under the base's thresholds on both sides; "own", under each side's.
        gate_packs: "primary", other rows are shown only; "all", they are judged as well.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal["softprune.gates"]
    version: Literal[1]
    name: str = Field(min_length=1)
    max_abs_delta_ppl: Limit
    max_rel_delta_ppl: Limit
    max_abs_delta_cc_rate: Limit
    max_abs_delta_mean_prob: Limit
    max_js2d: Limit
    primary_pack: str = Field(min_length=1)
    primary_seq_lens: list[Annotated[int, Field(ge=2)]] = Field(min_length=1)
    ppl_rule: PplRule = "min"
    cc_thresholds: CcThresholds = "base"
    gate_packs: GatePacks = "primary"

    @property
    def primary_rows(self) -> list[tuple[str, int]]:
        """(pack, block length) of the rows that must be there."""
        return [(self.primary_pack, length) for length in self.primary_seq_lens]

    @property
    def cc_metric(self) -> str:
        """Name of the confident-conflict rate that is judged."""
        return "cc_rate_base_thr" if self.cc_thresholds == "base" else "cc_rate"


@dataclass(frozen=True)
class RowDeltas:
    """What is judged of one row: candidate less base.

    Attributes:
        base_ppl: of the base.
        ppl, cc_rate, mean_prob: differences; cc_rate as a share, under the thresholds that the gates name.
        js2d: in nats; None if there are too few tokens to judge it.
        js2d_form: which form of JS2D that is, or why there is none.
    """

    base_ppl: float
    ppl: float
    cc_rate: float
    mean_prob: float
    js2d: float | None
    js2d_form: str = "raw"


@dataclass(frozen=True)
class Check:
    """One threshold at one row.

    Attributes:
        metric: ppl, cc_rate or cc_rate_base_thr, mean_prob, js2d.
        value: the difference, with its sign, or the divergence; None if it cannot be judged.
        limit: that its absolute value may reach.
        passed: whether it does not exceed it; None if nobody can tell.
        note: which limit of the perplexity binds, and which form of JS2D is judged.
    """

    metric: str
    value: float | None
    limit: float
    passed: bool | None
    note: str = ""


def check_row(deltas: RowDeltas, gates: Gates) -> list[Check]:
    """Judge bare numbers."""
    choose = min if gates.ppl_rule == "min" else max
    limit, note = choose(
        (gates.max_abs_delta_ppl, "absolute limit"),
        (gates.max_rel_delta_ppl * deltas.base_ppl, f"{gates.max_rel_delta_ppl:.3g} of the base's"),
    )
    return [
        Check("ppl", deltas.ppl, limit, abs(deltas.ppl) <= limit, note),
        _check(gates.cc_metric, deltas.cc_rate, gates.max_abs_delta_cc_rate),
        _check("mean_prob", deltas.mean_prob, gates.max_abs_delta_mean_prob),
        Check("js2d", deltas.js2d, gates.max_js2d, None if deltas.js2d is None else deltas.js2d <= gates.max_js2d, deltas.js2d_form),
    ]


def _check(metric: str, value: float, limit: float) -> Check:
    return Check(metric, value, limit, abs(value) <= limit)


def shipped() -> list[str]:
    """Names of the sets that softprune brings."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def read(name: str, **options: Any) -> Gates:
    """Read a set of thresholds.

    Args:
        name: of a shipped set, or a file's path.
        **options: `ppl_rule`, `cc_thresholds` or `gate_packs`, in place of the file's; None leaves it.

    Raises:
        GatesError: no such file or set, a threshold missing, or one that is no threshold.
    """
    path = _SHIPPED / f"{name}.json" if name in shipped() else Path(name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GatesError(name, "", error.strerror or str(error), f"a file of thresholds, or one of {', '.join(shipped())}") from None
    except (ValueError, RecursionError) as error:
        raise GatesError(name, "", f"no valid JSON ({error})", "a file of thresholds") from None
    if not isinstance(data, dict):
        raise GatesError(name, "", shortened(data), "an object with thresholds")
    try:
        return Gates.model_validate({**data, **{key: value for key, value in options.items() if value is not None}})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        found = "nothing" if first["type"] == "missing" else shortened(first["input"])
        raise GatesError(
            name, field, found, {"missing": "a value", "extra_forbidden": "no such key"}.get(first["type"], first["msg"])
        ) from None
