"""Putting a mask in force for a while, and leaving a server with the one that it was found with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from softprune.errors import InputError, SoftpruneError
from softprune.mask import ExpertMask
from softprune.server_client import ServerCallError, ServerClient


def switch_obeyed(control: ServerClient, mask: ExpertMask | None, called: str) -> None:
    """Put a mask in force, or none, and have every router show that it obeys.

    Args:
        called: what errors call the mask.

    Raises:
        ServerCallError: the server refuses it.
        InputError: a router does not obey.
    """
    control.switch(mask)
    if not (verified := control.verify())["obeyed"]:
        raise InputError(control.url, called, f"a router that does not obey the mask ({verified['detail']})", "routers that do")


class Restore:
    """What `mask_put_back` is to do at the end."""

    wanted = True

    def forget(self) -> None:
        """Leave the mask that is in force then."""
        self.wanted = False


@contextmanager
def mask_put_back(control: ServerClient) -> Iterator[Restore]:
    """Put the mask back that is in force now, whatever ends the block, unless the block says to forget it.

    Nor where somebody else has switched since `control` last did: their mask stays, which is an error unless the block ends by another.

    Raises:
        ServerCallError: the server cannot be asked; the block was not entered.
        SoftpruneError: the mask could not be put back, what it was is said; or somebody else has switched.
    """
    before, control.epoch = control.mask(), control.status()["mask_epoch"]
    restore = Restore()
    try:
        yield restore
    except BaseException:
        _put_back(control, before, restore)
        raise
    if not _put_back(control, before, restore):
        raise SoftpruneError(f"{control.url}: somebody else switched the mask meanwhile; theirs stays in force, and not {_named(before)}")


def _put_back(control: ServerClient, before: ExpertMask | None, restore: Restore) -> bool:
    """Whether what is in force is what should be."""
    if not restore.wanted:
        return True
    try:
        if control.epoch not in (None, control.status()["mask_epoch"]):
            return False
        control.switch(before)
    except (ServerCallError, KeyboardInterrupt, SystemExit) as error:
        why = error if isinstance(error, ServerCallError) else f"{control.url}: interrupted while it was asked"
        raise SoftpruneError(f"{why}\n  NOT PUT BACK: {_named(before)} was in force before; apply it again") from error
    return True


def _named(mask: ExpertMask | None) -> str:
    return "no mask" if mask is None else f"mask {mask.hash}"
