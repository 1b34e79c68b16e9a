"""README.md of a rewritten checkpoint, with the metadata that the Hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from softprune import __version__
from softprune.checkpoint.plan import RewritePlan
from softprune.checkpoint.side_files import CARD, MANIFEST, MAPPING, RECIPE
from softprune.report.sizes import readable

INHERITED = ("license", "license_name", "license_link", "language")
"""Metadata of the base model's own card that hold for the smaller model too."""


def base_model_of(source: Path, given: str | None = None) -> str:
    """The base model's name: as given, else from where the Hub's cache keeps it, else the folder's.

    Args:
        source: the checkpoint folder.
        given: a Hub name, or None.
    """
    if given:
        return given
    for part in source.resolve().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return source.resolve().name


def model_card(plan: RewritePlan, name: str, base_model: str, recipe: bool) -> str:
    """The card's text.

    Args:
        plan: the rewrite.
        name: of the new checkpoint.
        base_model: as the Hub knows it.
        recipe: whether a recipe lies in the folder.
    """
    provenance = plan.mask.provenance
    datasets = provenance.get("datasets")
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["softprune", "moe", "expert-pruning", *([str(provenance["method"])] if provenance.get("method") else [])],
        datasets=datasets if isinstance(datasets, list) else None,
        ignore_metadata_errors=True,
        **_inherited(plan.source),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(plan, name, base_model, recipe)}"


def _body(plan: RewritePlan, name: str, base_model: str, recipe: bool) -> str:
    spec, mask = plan.spec, plan.mask
    kept, total = sum(mask.num_kept), spec.num_layers * spec.num_experts
    padding = ""
    if plan.pad_to is not None:
        padding = f" Up to {plan.pad_to} a layer, experts of zeros were added that no token can reach: their router bias is -inf."
    part = ""
    if plan.layers is not None:
        part = f"\nThis is a dry run of decoder layers {', '.join(map(str, plan.layers))}: it can be verified, not served.\n"
    facts = {
        "base model": base_model,
        "method": mask.provenance.get("method", "not recorded in the mask"),
        "experts kept": f"{kept} of {total} ({kept / total:.1%}); {mask.summary.removesuffix(' experts kept')} in a layer",
        "experts per token": plan.top_k if plan.top_k == spec.top_k else f"{plan.top_k} (base: {spec.top_k})",
        "size of all tensors": f"{readable(plan.payload_bytes)} (base: {readable(plan.index.num_bytes)})",
        "mask": f"`{mask.hash}`",
        "base fingerprint": f"`{plan.fingerprint}`" if plan.fingerprint else "none, layers are missing",
        "written by": f"softprune {__version__}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    # Why each expert stays is told for every layer; that is for the manifest, where the whole mask stands.
    told = {key: value for key, value in mask.provenance.items() if key != "layers"}
    made = yaml.safe_dump(told, sort_keys=True, allow_unicode=True).strip() if told else "not recorded"
    how = f"\nThe whole recipe is in `{RECIPE}`.\n" if recipe else ""
    return f"""# {name}

{base_model} with fewer experts. Kept experts are the base model's, byte for byte; nothing was trained.{padding}
{part}
| | |
|---|---|
{rows}

## How the experts were chosen, and on which data
{how}
```yaml
{made}
```

`{MAPPING}` maps old expert ids to new ones; `{MANIFEST}` holds the mask and the SHA-256 of every file.

## Serve

```sh
vllm serve {name}
python -m sglang.launch_server --model-path {name}
```

## Verify

```sh
softprune verify BASE {name}
```
"""


def _inherited(source: Path) -> dict[str, Any]:
    """Metadata at the head of the source's own card; {} where there is none."""
    try:
        text = (source / CARD).read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return {}
    return {key: head[key] for key in INHERITED if key in head} if isinstance(head, dict) else {}
