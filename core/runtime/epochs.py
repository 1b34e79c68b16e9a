"""Mask epochs: which masks a request ran under, kept by the process that launches steps.

An epoch is a number that grows by one with every switch; 0 is the mask of the launch. A request's epochs are stamped when
a step with it is launched, not when the step's result is answered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

REMEMBERED = 10_000
"""Finished requests whose epochs can still be asked for."""


def cache_namespace(mask_hash: str | None, own: str | None) -> str | None:
    """The name under which a request's KV is cached: KV computed under one mask is never found under another.

    Args:
        mask_hash: of the mask in force, or None.
        own: the user's own `cache_salt` or `extra_key`, which still separates.

    Returns:
        None for the plain cache of an unpruned model. Two pairs never share a name.
    """
    return f"softprune:{mask_hash or 'unpruned'}:{own or ''}" if mask_hash or own else None


Names = Callable[[str], set[str]]
"""The ids, its own among them, that a client may know an engine's request by."""


def own_name(request_id: str) -> set[str]:
    """An engine that keeps the client's ids."""
    return {request_id}


class RequestIndex:
    """Epochs of the last requests, found by the ids that a client may know them by.

    An engine may make several requests of one call; the call's own id finds them all.
    """

    def __init__(self, room: int = REMEMBERED, names: Names = own_name) -> None:
        self._room, self._names = room, names
        self._epochs: OrderedDict[str, list[int]] = OrderedDict()
        self._named: dict[str, set[str]] = {}

    def add(self, request_id: str, epochs: list[int]) -> None:
        """Remember one request; the oldest is forgotten once there are too many."""
        if request_id not in self._epochs:
            for name in self._names(request_id):
                self._named.setdefault(name, set()).add(request_id)
        self._epochs[request_id] = epochs
        self._epochs.move_to_end(request_id)
        while len(self._epochs) > self._room:
            self._forget(next(iter(self._epochs)))

    def forget(self, name: str) -> None:
        """Forget all requests that go by this name."""
        for request_id in list(self._named.get(name, ())):
            self._forget(request_id)

    def find(self, name: str) -> dict[str, list[int]]:
        """Engine's id -> epochs, of every request that goes by this name; empty if there is none."""
        return {request_id: self._epochs[request_id] for request_id in sorted(self._named.get(name, ()))}

    def epochs(self, name: str) -> list[int] | None:
        """All epochs of the requests of one call, ascending; None if there are none."""
        found = self._named.get(name)
        return sorted({epoch for request_id in found for epoch in self._epochs[request_id]}) if found else None

    def _forget(self, request_id: str) -> None:
        del self._epochs[request_id]
        for name in self._names(request_id):
            self._named[name].discard(request_id)
            if not self._named[name]:
                del self._named[name]


class Epochs:
    """The mask in force, those before it, and which of them every request ran under.

    Attributes:
        masks: hash of the mask of each epoch, or None for none; the last is in force.
        tokens: tokens in the steps of each epoch, in prompts and answers.
        finished: requests that are done.
    """

    def __init__(self, mask_hash: str | None, names: Names = own_name) -> None:
        self.masks: list[str | None] = [mask_hash]
        self.tokens = [0]
        self.finished = RequestIndex(names=names)
        self._names = names
        self._running: dict[str, list[int]] = {}
        self._behind: set[str] = set()

    @property
    def current(self) -> int:
        """The epoch in force."""
        return len(self.masks) - 1

    @property
    def crossed(self) -> int:
        """Requests in flight that ran under an earlier mask as well."""
        return sum(epochs[0] != self.current for epochs in self._running.values())

    def switch(self, mask_hash: str | None) -> int:
        """Begin the next epoch: every step launched from now on runs under this mask."""
        self.masks.append(mask_hash)
        self.tokens.append(0)
        self._behind = set(self._running)
        return self.current

    def stamp(self, request_ids: Iterable[str], tokens: int, all_seen: bool = False) -> None:
        """A step with these requests is launched.

        Args:
            request_ids: those in the step.
            tokens: in the step.
            all_seen: each of them was in an earlier step, as in pure decoding; saves the loop where no switch is pending.
        """
        self.tokens[-1] += tokens
        if all_seen and not self._behind:
            return
        current = self.current
        for request_id in request_ids:
            epochs = self._running.get(request_id)
            if epochs is None:
                self._running[request_id] = [current]
            elif epochs[-1] != current:
                epochs.append(current)
                self._behind.discard(request_id)

    def finish(self, request_id: str) -> list[int]:
        """A request is done, or given up; its epochs, none if it never ran."""
        epochs = self._running.pop(request_id, [])
        self._behind.discard(request_id)
        if epochs:
            self.finished.add(request_id, epochs)
        return epochs

    def running(self, request_id: str) -> list[int]:
        """The epochs so far of a request that is not done."""
        return list(self._running.get(request_id, ()))

    def of(self, name: str) -> dict[str, Any] | None:
        """What `GET requests/{id}` answers; None if no such request is known.

        Returns:
            {"id", "epochs" of all its parts, "masks": {epoch: hash or None}, "parts": {engine's id: epochs}, "finished"}.
        """
        running = {request_id: epochs for request_id, epochs in self._running.items() if name in self._names(request_id)}
        parts = {**self.finished.find(name), **running}
        if not parts:
            return None
        epochs = sorted({epoch for part in parts.values() for epoch in part})
        masks = {str(epoch): self.masks[epoch] for epoch in epochs}
        return {"id": name, "epochs": epochs, "masks": masks, "parts": parts, "finished": not running}

    def status(self) -> dict[str, Any]:
        """For `GET status`."""
        return {"mask_epoch": self.current, "mask_hash": self.masks[-1], "crossed_requests": self.crossed}
