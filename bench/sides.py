"""A side of a comparison: how to bring it into force, and how to leave a server as it was found."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprune.bench.client import DecodeClient
from softprune.bench.errors import BenchmarkError
from softprune.bench.figures import Repeat
from softprune.mask import ExpertMask
from softprune.server_client import ServerCallError, ServerClient


class Side:
    """A server as it is.

    Attributes:
        client: entered; of this server.
        mask: the mask that is put in force; None for none, or where masks are not switched.
        counts: selections that the route probe saw in measured passes, [MoE layers, experts]; None without a probe.
    """

    mask: ExpertMask | None = None
    counts: NDArray[np.int64] | None = None

    def __init__(self, client: DecodeClient) -> None:
        self.client = client

    def enter(self) -> None:
        """Bring it into force."""

    def forget(self) -> None:
        """Begin to count anew."""
        self.counts = None

    async def measured(self, batch: int, place: int) -> Repeat:
        """One pass, with this side in force from its first to its last byte.

        Raises:
            BenchmarkError: as `DecodeClient.run_batch`, or the side was not in force throughout.
        """
        result = await self.client.run_batch(batch, place)
        await self.client.check_epoch(batch, place)
        return result


class MaskedSide(Side):
    """A mask of a server whose masks are switched live.

    Args:
        client, control: of that server.
        mask: None for the unpruned router.
        shared: what both sides of a server know: the "side" in force, its "epoch", and whether the route probe is read ("probed").
    """

    def __init__(self, client: DecodeClient, control: ServerClient, mask: ExpertMask | None, shared: dict[str, Any]) -> None:
        super().__init__(client)
        self.control, self.mask, self._shared = control, mask, shared

    def enter(self) -> None:
        """Switch, unless it is in force already."""
        if self._shared["side"] is not self:
            self._shared.update(side=self, epoch=self.control.switch(self.mask)["epoch"])

    async def measured(self, batch: int, place: int) -> Repeat:
        try:
            self.enter()
            if self._shared["probed"]:
                self.control.routes(reset=True)
            result = await self.client.run_batch(batch, place)
            found = self.control.status()["mask_epoch"]
            if self._shared["probed"] and place > 0:
                counts = np.array(self.control.routes()["counts"], np.int64)
                self.counts = counts if self.counts is None else self.counts + counts
        except ServerCallError as error:
            raise BenchmarkError(batch, place, None, f"{error.kind or 'no answer'}: {error.message}", "a mask switch") from None
        if found != self._shared["epoch"]:
            other = f"mask epoch {found}: someone else switched the mask during the pass"
            raise BenchmarkError(batch, place, None, other, f"epoch {self._shared['epoch']}")
        return result


def masked_sides(
    client: DecodeClient, control: ServerClient, masks: tuple[ExpertMask | None, ExpertMask | None], probed: bool
) -> tuple[Side, Side]:
    """Two sides of one server.

    Args:
        client, control: of the server.
        masks: of A and of B.
        probed: whether to read the route probe, if the server has one.
    """
    shared: dict[str, Any] = {"side": None, "epoch": None, "probed": probed and _has_probe(control)}
    a, b = (MaskedSide(client, control, mask, shared) for mask in masks)
    return a, b


def _has_probe(control: ServerClient) -> bool:
    try:
        control.routes()
    except ServerCallError as error:
        if error.status is None:
            raise
        return False
    return True
