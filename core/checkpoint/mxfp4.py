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
