"""Training: what counts in the loss, that a broken run goes on as if it had not been broken, and that the child is the parent in MXFP4."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from softprune.bench.tiny import PACKS, batches, train, weights
from softprune.bench.tiny.batches import Stream, spoken_tokens
from softprune.bench.tiny.train import Options, Run
from softprune.checkpoint.mxfp4 import dequantize, quantize, round_trip
from softprune.errors import InputError
from softprune.evaluate.reference import load_reference

CONTEXT = 32


def test_quantize_and_dequantize() -> None:
    values = 0.05 * torch.randn(3, 64, 40, generator=torch.Generator().manual_seed(1))
    values[0, :32, 0] = 0
    values[1, :32, 5] = torch.tensor([7.9, -6.1, 5.0, 3.5, 2.5, 0.25, 0.75, -0.1] * 4)
    blocks, scales = quantize(values)
    assert blocks.shape == (3, 40, 2, 16)
    assert scales.shape == (3, 40, 2)
    decoded = dequantize(blocks, scales).float()
    assert torch.equal(decoded, round_trip(values))
    assert torch.equal(round_trip(decoded), decoded)
    # Half of the largest step (2 of 6) at the larger scale, for a largest value just under 8.
    assert ((decoded - values).abs().amax(1) <= 0.25 * values.abs().amax(1) + 1e-9).all()
    assert (decoded - values).square().mean().sqrt() < 0.12 * values.std()
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize(torch.zeros(1, 33, 2))


def test_a_block_that_larger_scale_would_blur_is_cut() -> None:
    """7 is cut to 6 at the smaller scale, where the other values are exact; the larger scale would lose them."""
    values = torch.tensor([7.0, *([0.5, 1.5, 3.0] * 10), 0.5]).reshape(1, 32, 1)
    assert round_trip(values)[0, :2, 0].tolist() == [6.0, 0.5]
    values = torch.full((1, 32, 1), 7.9)
    assert round_trip(values).unique().tolist() == [8.0]


def test_spoken_tokens() -> None:
    start, end, call, user, assistant, message = 90, 91, 92, 1, 2, 93
    ids = np.array([start, user, message, 5, end, start, assistant, message, 6, 7, call, start, assistant, 8, message, 9], np.uint16)
    spoken = spoken_tokens(ids, start, [end, call], [assistant])
    assert spoken.nonzero()[0].tolist() == [6, 7, 8, 9, 10]


def test_stream_shows_every_block_once_an_epoch() -> None:
    tokens = np.arange(10 * CONTEXT + CONTEXT + 1, dtype=np.uint16)
    stream = Stream(tokens, tokens % 2 == 0, CONTEXT, 3, "cpu")
    ids, spoken = stream.take(0, 20)
    assert ids.shape == (20, CONTEXT + 1)
    assert torch.equal(spoken, ids % 2 == 0)
    for epoch in (ids[:10], ids[10:]):
        assert sorted((epoch[:, 0] - epoch[:, 0].min()).tolist()) == [CONTEXT * i for i in range(10)]
    assert not torch.equal(ids[:10], ids[10:])
    assert torch.equal(Stream(tokens, tokens % 2 == 0, CONTEXT, 3, "cpu").take(13, 4)[0], ids[13:17])
    assert stream.epochs(20) == 2


@pytest.fixture(scope="module", autouse=True)
def small_shape() -> Iterator[None]:
    """Two layers of 8 narrow experts: what is shown here does not hang on the size."""
    shape = {**weights.config(), "num_hidden_layers": 2, "num_local_experts": 8, "hidden_size": 64, "intermediate_size": 64}
    shape["layer_types"] = shape["layer_types"][:2]
    with pytest.MonkeyPatch.context() as patch:
        for module in (weights, train):
            patch.setattr(module, "config", lambda: dict(shape))
        yield


@pytest.fixture(scope="module")
def data() -> batches.Data:
    """Each pack counts up by its own step, so that there is something to learn."""
    tokens = {pack: (np.arange(4000) * (i + 1) % 97 + 100).astype(np.uint16) for i, pack in enumerate(PACKS)}
    ids = {pack: ids[: 2 * CONTEXT].reshape(2, CONTEXT) for pack, ids in tokens.items()}
    keep = {pack: np.tile(np.arange(CONTEXT) > 0, (2, 1)) for pack in PACKS}
    return batches.Data(tokens, {pack: np.ones(4000, bool) for pack in PACKS}, ids, keep)


OPTIONS = Options(seconds=1e9, tokens=24 * 8 * CONTEXT, sequences=8, device="cpu", experts="eager", attention="eager", compiled=False)


@pytest.fixture(scope="module")
def trained(data: batches.Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("trained")
    batches.save(data, folder / "data.npz.xz")
    run = Run(batches.load(folder / "data.npz.xz"), folder / "out", OPTIONS)
    run.train()
    run.finish(folder / "data.npz.xz")
    return run


def test_it_learns_and_says_what_it_did(trained: Run) -> None:
    result = json.loads((trained.out / "training.json").read_text())
    curve = json.loads((trained.out / "curve.json").read_text())
    assert result["steps"] == 24
    assert curve[-1]["train_loss"] < 0.75 * np.log(4096)
    assert set(curve[-1]["heldout"]) == set(PACKS)
    assert result["child"]["perplexity"] == curve[-1]["heldout"]


def test_child_is_the_parent_in_mxfp4(trained: Run, data: batches.Data) -> None:
    parent, child = (load_reference(trained.out / storage) for storage in ("bf16", "mxfp4"))
    differ = set()
    for (name, one), two in zip(parent.named_parameters(), child.parameters(), strict=True):
        expected = round_trip(trained.masters.weights[name]) if name.endswith(("gate_up_proj", "down_proj")) else one
        assert torch.equal(two, expected), name
        differ |= {name.split(".")[-1]} if not torch.equal(one, two) else set()
    assert differ == {"gate_up_proj", "down_proj"}
    ids = torch.from_numpy(data.heldout_ids["code"].astype(np.int64))
    trained.masters.refresh(mxfp4=True)
    with torch.no_grad():
        assert torch.allclose(trained._forward(ids), child(input_ids=ids).logits, atol=1e-4)
    trained.balance.take()


def test_a_broken_run_goes_on(trained: Run, data: batches.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "LOG_STEPS", 8)
    options = replace(OPTIONS, keep_every=0)
    first = Run(data, tmp_path / "out", options)
    step = first._step

    def breaks() -> tuple[torch.Tensor, torch.Tensor]:
        if first.steps == 13:
            raise KeyboardInterrupt
        return step()

    first._step = breaks  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    with pytest.raises(InputError, match="found .*; expected "):
        Run(data, tmp_path / "out", replace(options, seed=1)).train()
    second = Run(data, tmp_path / "out", options)
    second.train()
    assert [point["step"] for point in second.curve] == [8, 16, 24]
    for name, weight in trained.masters.weights.items():
        assert torch.allclose(weight, second.masters.weights[name], atol=1e-5), name


def test_an_expert_that_is_never_chosen_comes_back(data: batches.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "BIAS_STEP", 0.3)
    run = Run(data, tmp_path / "out", OPTIONS)
    name = "model.layers.1.mlp.router.bias"
    run.masters.weights[name][3] = -4
    assert run.heldout(mxfp4=False)["smallest_share"] == 0
    run.train()
    assert run.masters.weights[name][3] > -2
    assert run.heldout(mxfp4=True)["smallest_share"] > 0.01
