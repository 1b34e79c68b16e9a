"""A checkpoint with only the kept experts, written the plain way: load everything, index, save.

The reference for "mask == rewrite"; small models only.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from softprune.checkpoint.families import family_of, read_config, spec_of
from softprune.checkpoint.headers import TensorIndex
from softprune.mask import ExpertMask


def slice_checkpoint(model: Path, mask: ExpertMask, out: Path) -> None:
    config = read_config(model)
    family, spec, index = family_of(config), spec_of(config), TensorIndex(model)
    (number,) = set(mask.num_kept)
    tensors = {name: index.load(name) for name in index}
    for position, layer in enumerate(spec.moe_layers):
        keep = torch.tensor(mask.kept(position))
        router = [name.format(layer=layer) for name in (family.router_weight, family.router_bias) if name]
        for name in router + ([] if family.expert_index else [name.format(layer=layer) for name in family.expert_tensors]):
            tensors[name] = tensors[name][keep].contiguous()
        if family.expert_index:
            new_id = {old: new for new, old in enumerate(keep.tolist())}
            for name in [name for name in tensors if re.match(rf"model\.layers\.{layer}\..*experts\.\d+\.", name)]:
                old = int(re.search(r"experts\.(\d+)\.", name)[1])
                tensor = tensors.pop(name)
                if old in new_id:
                    tensors["new:" + name.replace(f"experts.{old}.", f"experts.{new_id[old]}.")] = tensor
            tensors = {name.removeprefix("new:"): tensor for name, tensor in tensors.items()}
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for path in model.iterdir():
        if path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
            shutil.copy(path, out)
    (out / "config.json").write_text(json.dumps({**config, family.num_experts_key: number}))
