"""MXFP4 in plain PyTorch: 4-bit E2M1 values in blocks of 32 that share an E8M0 scale (OCP MX v1.0).

gpt-oss packs two values a byte, the first in the low nibble; a scale byte s stands for 2**(s - 127).
"""

from __future__ import annotations

import torch

BLOCK = 32
"""Values that share one scale."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each 4-bit code."""


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decode gpt-oss expert weights to the layout of its BF16 checkpoints.

    The values are exactly those of Transformers' own dequantisation: every product of an E2M1 value and
    a power of two within BF16's range is a BF16 number, so nothing is rounded.

    Args:
        blocks: uint8 [num_experts, out, in / 32, 16].
        scales: uint8 [num_experts, out, in / 32].

    Returns:
        bfloat16 [num_experts, in, out], contiguous: MXFP4 stores rows by output, BF16 by input.
    """
    table = torch.tensor(E2M1, dtype=torch.float32)
    values = torch.empty(*blocks.shape[:-1], BLOCK, dtype=torch.float32)
    values[..., 0::2] = table[(blocks & 0x0F).to(torch.int32)]
    values[..., 1::2] = table[(blocks >> 4).to(torch.int32)]
    scaled = torch.ldexp(values, scales.to(torch.int32).unsqueeze(-1) - 127)
    rows = scaled.to(torch.bfloat16).flatten(-2)
    return rows.transpose(1, 2).contiguous()


def quantize(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode expert weights in the gpt-oss layout; the inverse of `dequantize`, which gives the values that were chosen.

    A block's scale is the power of two that puts its largest value just below 8 (OCP MX v1.0, 6.3) or the next one, which does not cut it
    to 6: whichever has the smaller squared error.

    Args:
        weights: [num_experts, in, out], any float dtype, finite; `in` is a multiple of 32.

    Returns:
        (blocks, scales): uint8 [num_experts, out, in / 32, 16] and uint8 [num_experts, out, in / 32].
    """
    values, exponents = _nearest(weights)
    table = torch.tensor(E2M1[:8], dtype=torch.float32, device=weights.device)
    codes = torch.searchsorted(table, values.abs()) + 8 * (values < 0)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return blocks, (exponents + 127).to(torch.uint8)


def round_trip(weights: torch.Tensor) -> torch.Tensor:
    """What is left of weights in MXFP4, without packing them: `dequantize(*quantize(weights))`, in the same shape and dtype float32."""
    values, exponents = _nearest(weights)
    return torch.ldexp(values, exponents.unsqueeze(-1)).flatten(-2).transpose(1, 2)


def _nearest(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(E2M1 values as float32 [num_experts, out, in / 32, 32], exponents of the scales as int32 [num_experts, out, in / 32])."""
    experts, columns, rows = weights.shape
    if columns % BLOCK:
        raise ValueError(f"weights of shape {tuple(weights.shape)}: the second dimension has to be a multiple of {BLOCK}")
    grouped = weights.float().transpose(1, 2).reshape(experts, rows, columns // BLOCK, BLOCK)
    _, exponent = torch.frexp(grouped.abs().amax(-1))
    low = (exponent - 3).clamp(-127, 126)
    values, errors = zip(*(_rounded(grouped, e) for e in (low, low + 1)), strict=True)
    higher = errors[1] < errors[0]
    return torch.where(higher.unsqueeze(-1), values[1], values[0]), torch.where(higher, low + 1, low)


def _rounded(grouped: torch.Tensor, exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values rounded to E2M1 (ties to even) at a scale of 2**exponent, and each block's squared error in units of the weights."""
    scaled = torch.ldexp(grouped, -exponent.unsqueeze(-1))
    size = scaled.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded = ((size / step).round() * step).clamp(max=6.0).copysign(scaled)
    error = torch.ldexp((rounded - scaled).square().sum(-1), 2 * exponent)
    return rounded, error
