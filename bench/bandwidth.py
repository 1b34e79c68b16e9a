"""How fast memory can be copied: what a roofline divides by. Bytes read and bytes written both count."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from softprune.errors import InputError
from softprune.report.sizes import readable

ROUNDS = 7
CPU_BYTES, GPU_BYTES = 256 << 20, 1 << 30
"""Far more than caches hold."""


@dataclass(frozen=True)
class Bandwidth:
    """10^9 bytes per second, and how that was found out."""

    gb_s: float
    how: str


def given(gb_s: float) -> Bandwidth:
    """What a user knows."""
    return Bandwidth(gb_s, "given with --bandwidth")


def measured(gpu: str | None, local: bool) -> Bandwidth:
    """Copy for a second or so, on the device that the server is on; the best round counts, since noise only slows.

    Args:
        gpu: the server's device as it is called; None or "cpu" for a CPU.
        local: whether the server is on this machine.

    Raises:
        InputError: that device cannot be reached from here.
    """
    if not local:
        raise InputError("--bandwidth", "", "none, of a server that may be on another machine", "its memory's GB/s, read and written")
    if gpu in (None, "cpu"):
        return _copy(torch.device("cpu"), CPU_BYTES)
    if not torch.cuda.is_available():
        raise InputError("--bandwidth", "", f"none, and no PyTorch here that can use {gpu}", "its memory's GB/s, read and written")
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * CPU_BYTES:
        raise InputError("--bandwidth", "", f"none, and only {readable(free)} free on {gpu}", "its memory's GB/s, read and written")
    return _copy(torch.device("cuda"), min(GPU_BYTES, free // 4))


def _copy(device: torch.device, num_bytes: int) -> Bandwidth:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = 10 if device.type == "cuda" else 1
    best = float("inf")
    for number in range(ROUNDS + 2):
        _wait(device)
        began = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        _wait(device)
        if number >= 2:  # the first ones touch new pages
            best = min(best, (time.perf_counter() - began) / copies)
    kind = f"device-to-device copy on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "copy in this machine's memory"
    how = f"PyTorch {kind} of {readable(num_bytes)}, best of {ROUNDS}, bytes read and written"
    return Bandwidth(2 * num_bytes / best / 1e9, how)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
