"""What triton_kernels make of the tokens of an expert that they are told, by their own rule, as SGLang has them.

    .venv-sglang/bin/python -m pytest tests/engines/inside_sglang/test_tiles.py

The rule asks for the GPU's properties, which are an H200's here; nothing runs on one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softprune.runtime.tiles import fit_tiles, rows_of_tile

TOP_K, EXPERTS, WIDTH = 4, 32, 2880


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    from triton_kernels import matmul_ogs, target_info
    from triton_kernels.matmul_ogs_details import opt_flags

    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(target_info, "cuda_capability_geq", lambda major, minor=0: (major, minor) <= (9, 0))
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend="cuda")))
    runtime = SimpleNamespace(driver=driver)
    triton = SimpleNamespace(next_power_of_2=opt_flags.triton.next_power_of_2, cdiv=opt_flags.triton.cdiv, runtime=runtime)
    monkeypatch.setattr(opt_flags, "triton", triton)
    monkeypatch.setattr(matmul_ogs, "make_opt_flags", matmul_ogs.make_opt_flags)  # put back at the end
    return matmul_ogs


def tile(kernels: Any, rows: int, experts: int) -> int:
    """Rows of the tile that the kernels choose for the first product of a layer."""
    from triton_kernels.tensor import FP4

    routing = kernels.RoutingData(None, torch.ones(experts), experts, TOP_K, SimpleNamespace())
    precision = kernels.PrecisionConfig(weight_scale=None)
    flags = kernels.make_opt_flags(
        torch.bfloat16, torch.bfloat16, FP4, precision, 1, rows * TOP_K, 2 * WIDTH, WIDTH, routing, False, False, None, False, False, None
    )
    return int(flags.block_m)


@pytest.mark.parametrize("kept", [8, 16, 24])
def test_they_choose_the_tile_of_the_rule(kernels: Any, kept: int) -> None:
    batches = [*range(1, 300), 512, 600, 1024, 8192]
    own, of_others = ([tile(kernels, rows, experts) for rows in batches] for experts in (EXPERTS, 20))
    assert [tile(kernels, rows, EXPERTS) for rows in (64, 128, 256)] == [16, 32, 64]
    assert fit_tiles(kept, EXPERTS)
    wanted = [max(before, rows_of_tile(rows * TOP_K / kept)) for before, rows in zip(own, batches, strict=True)]
    assert [tile(kernels, rows, EXPERTS) for rows in batches] == wanted
    assert wanted != own
    assert [tile(kernels, rows, 20) for rows in batches] == of_others
