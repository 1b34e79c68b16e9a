"""What a recipe says, whatever the file's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import yaml

from softprune.errors import shortened
from softprune.recipe.errors import RecipeError
from softprune.selection.select import Protect, Union

KIND: Final = "reap_recipe"
SCHEMA: Final = 1
MAX_SHARD_GB = 5.0
"""Largest shard, in decimal GB (spec/metrics.md 5.1)."""


@dataclass(frozen=True)
class Recipe:
    """From statistics, or whatever else a method ranks by, to a checkpoint.

    Attributes:
        name: of the recipe.
        description: free text.
        base_model: Hub name or folder of the model that is pruned.
        method, parameters: the criterion; method None asks for `scores`.
        tags, normalise_tags: see `softprune.ranking.tags`.
        budget: keyword arguments of `select`: one of keep, keep_frac and compression_ratio, and rounding, keep_multiple, backend.
        protect, union: see `select`.
        max_shard_gb: decimal GB.
        model: folder of the model, relative to the recipe's; None where it is given when the recipe is run.
        statistics, ranking, scores: files, relative to the recipe's folder.
        num_experts, top_k: of the model, where the recipe says them; checked.
        notes: sections that softprune takes along and does not read: how the data were made, how it is evaluated, and so on.
    """

    name: str
    description: str = ""
    base_model: str | None = None
    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, float] = field(default_factory=dict)
    normalise_tags: bool = False
    budget: Mapping[str, Any] = field(default_factory=dict)
    protect: Protect = field(default_factory=Protect)
    union: Union | None = None
    max_shard_gb: float = MAX_SHARD_GB
    model: str | None = None
    statistics: tuple[str, ...] = ()
    ranking: str | None = None
    scores: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def max_shard_bytes(self) -> int:
        """Largest shard in bytes."""
        return int(self.max_shard_gb * 1e9)

    @property
    def datasets(self) -> list[str]:
        """Hub names of the data that the statistics were made from, as far as the recipe says."""
        profiling = self.notes.get("profiling_data")
        repository = profiling.get("dataset_repo") if isinstance(profiling, dict) else None
        return [repository] if isinstance(repository, str) else []

    @property
    def eval_regime(self) -> Mapping[str, Any]:
        """How the recipe's evaluations are made, as far as it says: seq_lens_csv (text), num_blocks (whole number).

        Raises:
            RecipeError: one of them is something else.
        """
        evaluation = self.notes.get("evaluation")
        regime = evaluation.get("canonical_eval_regime") if isinstance(evaluation, dict) else None
        given = {name: value for name, value in (regime if isinstance(regime, dict) else {}).items() if value is not None}
        if isinstance(lengths := given.get("seq_lens_csv"), int) and not isinstance(lengths, bool):
            given["seq_lens_csv"] = str(lengths)
        for name, kind, expected in (("seq_lens_csv", str, "lengths with commas, e.g. 1024,2048"), ("num_blocks", int, "a whole number")):
            if name in given and (not isinstance(given[name], kind) or isinstance(given[name], bool)):
                raise RecipeError(self.name or "recipe", f"evaluation.canonical_eval_regime.{name}", shortened(given[name]), expected)
        return given

    def document(self) -> dict[str, Any]:
        """The recipe in the one shape that is written."""
        budget = dict(self.budget)
        model = {
            "base_model_id": self.base_model, "pruned_model_label": self.name, "keep_n": budget.get("keep"),
            "keep_frac_requested": budget.get("keep_frac"), "compression_ratio": budget.get("compression_ratio"),
            "num_experts": self.num_experts, "uniform_keep_n_across_layers": True, "top_k_unchanged": True,
        }  # fmt: skip
        source = {
            "model_path": self.model, "statistics": list(self.statistics) or None, "ranking": self.ranking, "scores_yaml": self.scores,
        }  # fmt: skip
        core = {
            "core_pos_top_m": self.protect.top_mass, "core_count_top_m": self.protect.top_count,
            "super_experts": self.protect.super_experts, "tag_top_m": self.protect.tag_top,
        }  # fmt: skip
        constraints = {
            "keep_n_multiple_of": budget.get("keep_multiple"), "keep_n_round": budget.get("rounding"), "backend": budget.get("backend"),
            "core_experts": core, "union": None if self.union is None else asdict(self.union),
        }  # fmt: skip
        scoring = {
            "method": self.method, "top_k": self.top_k, "parameters": dict(self.parameters), "tags": dict(self.tags),
            "normalise_tags": self.normalise_tags,
        }  # fmt: skip
        return {
            "schema_version": SCHEMA, "kind": KIND, "name": self.name, "description": self.description, "source": _said(source),
            "model": _said(model), "scoring": _said(scoring), "selection_constraints": _said(constraints),
            "structural_rewrite": {
                "writer": "safetensors", "max_shard_size_gb": self.max_shard_gb, "shard_bytes_definition": "decimal_gb",
                "mapping_file_in_model_dir": "expert_mapping.json",
            },
            **self.notes,
        }  # fmt: skip

    def dump(self) -> str:
        """The file's text; equal recipes give equal bytes."""
        return str(yaml.safe_dump(self.document(), sort_keys=False, allow_unicode=True, width=120))


def _said(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if value is not None}
