"""Putting a mask in force for a while, and leaving a server with the one that it was found with."""

from __future__ import annotations

import signal
import threading
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

    Raises:
        ServerCallError: the server cannot be asked; the block was not entered.
        SoftpruneError: the mask could not be put back; what it was is said.
    """
    before = control.mask()
    restore = Restore()
    try:
        yield restore
    finally:
        if restore.wanted:
            what = "no mask" if before is None else f"mask {before.hash}"
            try:
                control.switch(before)
            except (ServerCallError, KeyboardInterrupt, SystemExit) as error:
                why = error if isinstance(error, ServerCallError) else f"{control.url}: interrupted while it was asked"
                raise SoftpruneError(f"{why}\n  NOT PUT BACK: {what} was in force before; apply it again") from error


@contextmanager
def terminated_by_signal() -> Iterator[None]:
    """Within the block, SIGTERM ends the process as Ctrl-C does: what has to be put back is put back first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
