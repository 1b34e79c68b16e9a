"""What `POST stats/start` asks for."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softprune.control import BODY, ControlError
from softprune.errors import shortened
from softprune.stats.header import Mode

DEFAULT_SAMPLE = 16
_EXPECTED = '{"mode": "router", "reap" or "eaft", "sample": N, "shadow": true or false, "attribution": "predictor" or "target"}'


class StatsRequest(BaseModel):
    """The body.

    Attributes:
        mode: what to collect; each mode has those before it in it.
        sample: N of 1 token in N, for all that is sampled.
        shadow: also count what the router would choose without a mask, of sampled tokens.
        attribution: whose activations a token's p and H are counted with; see `softprune.stats.header.Eaft`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    mode: Mode
    sample: int = Field(default=DEFAULT_SAMPLE, ge=1, le=1_000_000)
    shadow: bool = False
    attribution: Literal["predictor", "target"] = "predictor"

    @classmethod
    def parse(cls, body: bytes) -> StatsRequest:
        """Read a request's body.

        Raises:
            ControlError: 400 invalid_mode, naming the field, what was found and what was expected.
        """
        try:
            return cls.model_validate(json.loads(body))
        except ValidationError as error:
            field = ".".join(str(part) for part in error.errors()[0]["loc"])
            where = f"{BODY}: {field}" if field else BODY
            message = f"{where}: found {shortened(error.errors()[0]['input'])}; expected {_EXPECTED}"
            raise ControlError(400, "invalid_mode", message) from None
        except (ValueError, RecursionError) as error:
            raise ControlError(400, "invalid_mode", f"{BODY}: found no valid JSON ({error}); expected {_EXPECTED}") from None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the collector's start."""
        return self.model_dump()
