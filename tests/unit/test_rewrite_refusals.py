"""What cannot be rewritten is refused by name, before anything is written; what is cut off leaves nothing under the final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from softprune.bench.tiny.weights import TRAINED
from softprune.checkpoint.families import read_config, spec_of
from softprune.checkpoint.headers import INDEX
from softprune.checkpoint.rewrite import rewrite
from softprune.checkpoint.synth import synth_checkpoint
from softprune.checkpoint.verify import verify_checkpoint
from softprune.errors import CheckpointError, InputError
from softprune.mask import ExpertMask
from softprune.mask_forms import build
from tests.conftest import random_mask, saved

FIRST = "model-00001-of-00002.safetensors"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TRAINED, tmp_path / "source"))


@pytest.fixture(scope="module")
def mask() -> ExpertMask:
    return random_mask(TRAINED, 24)


def change_header(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit the first shard's header, and keep its length right."""
    data = (source / FIRST).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (source / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def change_tensors(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit the first shard's tensors, and let the index follow."""
    tensors = load_file(source / FIRST)
    change(tensors)
    save_file(tensors, source / FIRST, metadata={"format": "pt"})
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != FIRST or name in tensors}
    index["weight_map"] |= dict.fromkeys(tensors, FIRST)
    (source / INDEX).write_text(json.dumps(index))


def truncated(source: Path) -> None:
    os.truncate(source / FIRST, (source / FIRST).stat().st_size - 1)


def cut_within_the_header(source: Path) -> None:
    os.truncate(source / FIRST, 100)


def corrupt(source: Path) -> None:
    data = bytearray((source / FIRST).read_bytes())
    data[8] ^= 0x40
    (source / FIRST).write_bytes(data)


def huge_header(source: Path) -> None:
    data = (source / FIRST).read_bytes()
    (source / FIRST).write_bytes(b"\xff" * 8 + data[8:])


def lying_shape(source: Path) -> None:
    change_header(source, lambda header: header[SCALES].update(shape=[31, *header[SCALES]["shape"][1:]]))


def lying_offsets(source: Path) -> None:
    change_header(source, lambda header: header[SCALES].update(data_offsets=[n + 4 for n in header[SCALES]["data_offsets"]]))


def missing_file(source: Path) -> None:
    (source / FIRST).unlink()


def index_of_a_missing_file(source: Path) -> None:
    text = (source / INDEX).read_text()
    (source / INDEX).write_text(text.replace(f'"{SCALES}": "{FIRST}"', f'"{SCALES}": "gone.safetensors"'))


def index_outside_the_folder(source: Path) -> None:
    text = (source / INDEX).read_text()
    (source / INDEX).write_text(text.replace(f'"{SCALES}": "{FIRST}"', f'"{SCALES}": "../{FIRST}"'))


def twice_in_the_index(source: Path) -> None:
    text = (source / INDEX).read_text()
    (source / INDEX).write_text(text.replace(f'"{SCALES}": "{FIRST}"', f'"{SCALES}": "{FIRST}", "{SCALES}": "{FIRST}"'))


def in_two_shards(source: Path) -> None:
    second = next(source.glob("model-00002*"))
    save_file(load_file(second) | {SCALES: load_file(source / FIRST)[SCALES]}, second)


def not_in_the_index(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    del index["weight_map"][SCALES]
    (source / INDEX).write_text(json.dumps(index))


def other_expert_count(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({SCALES: tensors[SCALES][:31].contiguous()}))


def no_scales(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.pop(SCALES))


def other_dtype(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({SCALES: tensors[SCALES].to(tensors["model.layers.1.mlp.router.bias"].dtype)}))


def unknown_expert_tensor(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({"model.layers.1.mlp.experts.extra": tensors[SCALES].clone()}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, rf"{FIRST}: header: found unreadable \(.*; expected a whole safetensors file"),
        (cut_within_the_header, rf"{FIRST}: header: found unreadable"),
        (corrupt, rf"{FIRST}: header: found unreadable"),
        (huge_header, rf"{FIRST}: header: found unreadable"),
        (lying_shape, rf"{FIRST}: header: found unreadable"),
        (lying_offsets, rf"{FIRST}: header: found unreadable"),
        (missing_file, rf"{FIRST}: found no such file; expected a shard that the index names"),
        (index_of_a_missing_file, "gone.safetensors: found no such file; expected a shard that the index names"),
        (index_outside_the_folder, rf"weight_map: found '../{FIRST}'; expected names of files in the same folder"),
        (twice_in_the_index, rf"{INDEX}: weight_map: found unreadable \({SCALES} is there twice\)"),
        (in_two_shards, f"{SCALES}: found a tensor that is also in {FIRST}; expected each tensor in one shard"),
        (not_in_the_index, f"{SCALES}: found a tensor that {INDEX} does not list; expected each tensor in the index"),
        (other_expert_count, rf"{SCALES}: found shape \[31, .*; expected 32 experts in the first dimension, as config.json says"),
        (no_scales, f"{SCALES}: found no such tensor; expected one, as gpt-oss-mxfp4 has in each layer"),
        (other_dtype, f"{SCALES}: found dtype BF16; expected U8, as MXFP4 is stored"),
        (unknown_expert_tensor, "experts.extra: found a router or expert tensor that has no place in this model"),
    ],
)
def test_damaged_sources(source: Path, tmp_path: Path, mask: ExpertMask, damage: Callable[[Path], None], message: str) -> None:
    damage(source)
    with pytest.raises(CheckpointError, match=message):
        rewrite(source, mask, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_shrinks_while_it_is_read(source: Path, tmp_path: Path, mask: ExpertMask, monkeypatch: pytest.MonkeyPatch) -> None:
    from softprune.checkpoint import rewrite as module

    def shrink(*arguments: Any) -> Any:
        truncated(source)
        return check(*arguments)

    check = module.check_room
    monkeypatch.setattr(module, "check_room", shrink)
    with pytest.raises(CheckpointError, match=rf"{FIRST}: found \d+ bytes; expected at least \d+, as its header says"):
        rewrite(source, random_mask(TRAINED, 32), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def uneven(model: Path) -> ExpertMask:
    spec = spec_of(read_config(model))
    return random_mask(model, [4 + layer for layer in range(spec.num_layers)])


def test_masks_that_do_not_fit(models: dict[str, Path], tmp_path: Path, mask: ExpertMask) -> None:
    other = synth_checkpoint("tiny", tmp_path / "other", "mxfp4", seed=9)
    assert other is None
    uneven_k = build(spec_of(read_config(TRAINED)), [None] * 4, None, {}, "k").model_copy(update={"top_k": [4, 4, 2, 4]})
    qwen, spec = models["qwen3-moe"], spec_of(read_config(TRAINED))
    for source, made, options, message in (
        (tmp_path / "other", mask, {}, r"mask: model.fingerprint: found sha256:.*--expert-mask-force"),
        (qwen, mask, {}, "mask: model.architecture: found GptOssForCausalLM; expected Qwen3MoeForCausalLM"),
        (TRAINED, uneven(TRAINED), {}, "keep: found 4 to 7 experts kept; expected one number .*num_local_experts; --pad-to 7 fills"),
        (
            qwen,
            uneven(qwen),
            {},
            "keep: found 4 to 7 .* one number for all layers, as config.json has for num_experts$",
        ),
        (qwen, uneven(qwen), {"pad_to": 8}, "--pad-to: found 8; expected none for qwen3-moe: its routers have no bias"),
        (TRAINED, mask, {"pad_to": 23}, "--pad-to: found 23; expected from 24"),
        (TRAINED, mask, {"pad_to": 33}, "--pad-to: found 33; .* the model's 32"),
        (TRAINED, uneven_k, {}, "top_k: found 2 to 4; expected the same in each layer"),
        (TRAINED, mask, {"layers": [4]}, "--layers: found 4; expected decoder layers with experts, of 0 to 3"),
        (TRAINED, mask, {"layers": []}, "--layers: found none"),
        (TRAINED, mask, {"max_shard_bytes": 0}, "--max-shard-size: found 0"),
        (TRAINED, mask, {"recipe": tmp_path / "no.yaml"}, "no.yaml: found no such file; expected a recipe"),
        (TRAINED, tmp_path / "no.json", {}, "no.json: found No such file"),
        (tmp_path / "nowhere", build(spec, [None] * 4, None, {}, "m"), {}, "config.json: found no such file"),
    ):
        with pytest.raises(InputError, match=message):
            rewrite(source, made, tmp_path / "out", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert rewrite(tmp_path / "other", mask, tmp_path / "forced", force=True).warnings


def test_a_part_without_layers_named(tmp_path: Path) -> None:
    synth_checkpoint("tiny", tmp_path / "part", "mxfp4", layers=[0, 2])
    mask = build(spec_of(read_config(tmp_path / "part")), [range(24)] * 4, None, {}, "first")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.router\.weight: found no such tensor; .*--layers names layers"):
        rewrite(tmp_path / "part", mask, tmp_path / "out", layers=[0, 1])
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.router\.weight: found no such tensor"):
        rewrite(tmp_path / "part", mask, tmp_path / "out")
    made_for_another = mask.model_copy(update={"model": mask.model.model_copy(update={"fingerprint": "sha256:" + "0" * 64})})
    with pytest.raises(InputError, match="expected null: .* lacks layers"):
        rewrite(tmp_path / "part", made_for_another, tmp_path / "out", layers=[0])


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_a_name_that_is_taken(tmp_path: Path, mask: ExpertMask, kind: str) -> None:
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to("nowhere")}[kind]()
    with pytest.raises(CheckpointError, match="out: found a .*; expected a new name"):
        rewrite(TRAINED, mask, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_room_is_found_before_anything_is_written(tmp_path: Path, mask: ExpertMask, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 20_000_000, 20_000_000))
    with pytest.raises(CheckpointError, match="out: free space: found 20,000,000 bytes on its disk; expected at least 32,"):
        rewrite(TRAINED, mask, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, mask: ExpertMask, monkeypatch: pytest.MonkeyPatch) -> None:
    real, budget = os.write, [5_000_000]

    def write(handle: int, data: Any) -> int:
        budget[0] -= len(data)
        if budget[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError, match="No space left on device; expected a file that can be read and written"):
        rewrite(TRAINED, mask, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from softprune import mask
from softprune.checkpoint.plan import plan_rewrite
from softprune.checkpoint.rewrite import execute
source, mask_file, out, moment = sys.argv[1:]
plan = plan_rewrite(source, mask.load(mask_file), max_shard_bytes=1_000_000)
def wait(name, num_bytes):
    if name.startswith(moment):
        print("now", flush=True)
        time.sleep(600)
execute(plan, out, workers=1, progress=wait)
"""


@pytest.mark.parametrize("moment", ["model-", "tokenizer.json", "verifying"])
def test_kill_9_leaves_nothing_under_the_name_and_a_rerun_cleans_up(tmp_path: Path, mask: ExpertMask, moment: str) -> None:
    path, out = saved(mask, tmp_path / "mask.json"), tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(TRAINED), path, str(out), moment], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == [".out.writing", "mask.json"]
    assert list((tmp_path / ".out.writing").iterdir())
    with pytest.raises(CheckpointError, match=r"out: found another process that writes it, in \.out\.writing; expected one writer"):
        rewrite(TRAINED, mask, out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (tmp_path / ".out.writing" / "a folder").mkdir()
    assert not out.exists()
    rewrite(TRAINED, mask, out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mask.json", "out"]
    assert verify_checkpoint(TRAINED, out).problems == []


def test_ctrl_c_leaves_nothing(tmp_path: Path, mask: ExpertMask) -> None:
    path = saved(mask, tmp_path / "mask.json")
    code = KILLED.replace("time.sleep(600)", "time.sleep(0.2)").replace("import sys, time", "import signal, sys, time")
    code = code.replace("source, mask_file", "signal.signal(signal.SIGINT, signal.default_int_handler)\nsource, mask_file", 1)
    command = [sys.executable, "-c", code, str(TRAINED), path, str(tmp_path / "out"), "model-"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert time.monotonic() - begun < 10
    assert [file.name for file in tmp_path.iterdir()] == ["mask.json"]
