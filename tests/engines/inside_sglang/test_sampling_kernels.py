"""The kernels that keep sampled rows and score tokens, in Triton's interpreter, against PyTorch.

TRITON_INTERPRET=1 .venv-sglang/bin/python -m pytest tests/engines/inside_sglang/test_sampling_kernels.py
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton decides at import; make test runs it by itself")


@pytest.mark.parametrize("padding", [0, 24])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_kept_rows_equal_pytorch(rows: int, padding: int) -> None:
    from softprune.runtime import sample_slab_kernel
    from softprune.runtime.sample_slab import SampleSlab

    generator = torch.Generator().manual_seed(rows)
    both = [SampleSlab(2, 24, 1500, "cpu", torch.bfloat16) for _ in range(2)]
    copies = torch.zeros(2, 2, 90, 24).bfloat16()
    for step in range(3):
        sampled = np.sort(np.random.default_rng(step).choice(100, min(rows, 7), replace=False)) % rows
        hidden = torch.randn(rows, 1500 + padding, generator=generator).bfloat16()
        logits = torch.randn(rows, 24, generator=generator).bfloat16()
        for slab in both:
            slab.describe(sampled)
        for layer in range(2):
            to = [copy[layer, :rows] if step else None for copy in copies]
            sample_slab_kernel.take(both[0], layer, hidden, logits, to[0])
            both[1].reference(layer, hidden, logits, to[1])
        kept = slice(both[1].used - len(sampled), both[1].used)
        assert torch.equal(both[1].hidden[1, kept], hidden[torch.from_numpy(sampled), :1500])
    assert torch.equal(both[0].hidden, both[1].hidden)
    assert torch.equal(both[0].logits, both[1].logits)
    assert copies[1].any()
    assert torch.equal(copies[0], copies[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [7, 5000, 12_345])
def test_scores_equal_pytorch(vocabulary: int, dtype: torch.dtype) -> None:
    """Also where most tokens are -inf, and of a distribution that is all but certain."""
    from softprune.runtime import token_scores_kernel
    from softprune.runtime.token_scores import reference

    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(6, vocabulary, generator=generator) * torch.tensor([1.0, 4.0, 20.0, 1.0, 0.0, 3.0])[:, None]).to(dtype)
    logits[3, 5:] = -torch.inf
    logits[5] += 1000
    tokens = torch.randint(0, 5, (6,), generator=generator)
    found, expected = token_scores_kernel.token_scores(logits, tokens), reference(logits, tokens)
    assert torch.isfinite(expected).all()
    assert torch.allclose(found, expected, atol=2e-4, rtol=1e-4)
