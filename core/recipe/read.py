"""Reading recipes: the study's two shapes, and ours, which is its first with some keys more (spec/metrics.md 6).

The first has `kind: reap_recipe`; the second, which the study's builds export by themselves, is flatter and may hold several
variants of one profile. Sections that say what softprune is to do are read strictly, so that a misspelt key does not silently change
a model; all others are taken along unread. Commands under `execution` are never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from softprune.errors import shortened
from softprune.ranking.registry import ALIASES, CRITERIA
from softprune.recipe.errors import RecipeError
from softprune.recipe.recipe import KIND, MAX_SHARD_GB, SCHEMA, Recipe
from softprune.selection.select import Protect, Union
from softprune.yaml_file import read_yaml

_REMARKS = {"notes", "note", "compatibility_notes", "implementation_notes"}
_EAFT = ("cc_quantile", "uncertain_quantile", "w_good", "w_uncertain", "w_conflict")
_ENTROPY_TOP = 20
_READ = {"schema_version", "kind", "name", "description", "source", "model", "scoring", "selection_constraints", "structural_rewrite"}
_TAKEN_ALONG = {"profiling_data", "evaluation", "execution", "status"}


def read_recipe(path: str | Path, variant: str | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: the file.
        variant: which of several that a file of the second shape holds.

    Raises:
        RecipeError: missing, no recipe, or a key or value that it cannot have.
    """
    source, data = str(path), read_yaml(path, "a recipe", RecipeError)
    if not isinstance(data, dict):
        raise RecipeError(source, "", type(data).__name__, "a recipe")
    if data.get("schema_version") != SCHEMA or isinstance(data["schema_version"], bool):
        raise RecipeError(source, "schema_version", shortened(data.get("schema_version")), str(SCHEMA))
    reader = _Reader(source)
    if data.get("kind") == KIND:
        if variant is not None:
            raise RecipeError("--variant", "", variant, f"none, since {source} holds one recipe")
        return reader.first_shape(data)
    if "kind" not in data and "variants" in data:
        return reader.second_shape(data, variant)
    raise RecipeError(source, "kind", shortened(data.get("kind")), f"{KIND}, or a recipe with variants")


class _Reader:
    """Reads sections strictly; errors name the file and the field."""

    def __init__(self, source: str) -> None:
        self.source = source

    def first_shape(self, data: Mapping[str, Any]) -> Recipe:
        self._only(data, "", _READ | _TAKEN_ALONG)
        model = self._section(data, "model")
        self._only(model, "model", {
            "base_model_id", "pruned_model_label", "pruned_variant_name", "keep_frac_requested", "keep_frac_actual", "keep_n",
            "num_experts", "uniform_keep_n_across_layers", "top_k_unchanged", "constraints", "compression_ratio",
        })  # fmt: skip
        for name in ("uniform_keep_n_across_layers", "top_k_unchanged"):
            if model.get(name, True) is not True:
                raise RecipeError(self.source, f"model.{name}", shortened(model[name]), "true, the only one that softprune runs")
        constraints = self._section(data, "selection_constraints")
        self._only(constraints, "selection_constraints", {"keep_n_multiple_of", "keep_n_round", "backend", "core_experts", "union"})
        core = self._section(constraints, "core_experts")
        self._only(core, "core_experts", {"core_pos_top_m", "core_count_top_m", "super_experts", "tag_top_m"})
        scoring, profiling = self._section(data, "scoring"), self._section(data, "profiling_data")
        source, writing = self._section(data, "source"), self._section(data, "structural_rewrite")
        self._only(writing, "structural_rewrite", {
            "writer", "max_shard_size_gb", "shard_bytes_definition", "mapping_file_in_model_dir", "keep_n_multiple_of",
        })  # fmt: skip
        multiple = self._same("keep_n_multiple_of", {
            "selection_constraints": constraints, "model.constraints": self._section(model, "constraints"), "structural_rewrite": writing,
        })  # fmt: skip
        method, parameters = self._scoring(scoring, profiling)
        if writing.get("writer", "safetensors") != "safetensors" or writing.get("shard_bytes_definition", "decimal_gb") != "decimal_gb":
            found = f"{writing.get('writer')}, {writing.get('shard_bytes_definition')}"
            raise RecipeError(self.source, "structural_rewrite", found, "writer safetensors, shard_bytes_definition decimal_gb")
        statistics, union = source.get("statistics") or [], constraints.get("union")
        files = [statistics] if isinstance(statistics, str) else statistics
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise RecipeError(self.source, "source.statistics", shortened(statistics), "a file, or a list of files")
        tags = self._section(scoring, "tags")
        for tag, weight in tags.items():
            if not isinstance(tag, str) or not _is_number(weight):
                raise RecipeError(self.source, f"scoring.tags.{tag}", shortened(weight), "a weight")
        return Recipe(
            name=str(data.get("name", "")), description=str(data.get("description", "")).strip(), base_model=model.get("base_model_id"),
            method=method, parameters=parameters, tags=tags,
            normalise_tags=self._value(scoring, "scoring.normalise_tags", False, lambda value: isinstance(value, bool), "true or false"),
            budget=self._budget(model, multiple, constraints.get("keep_n_round"), constraints.get("backend")),
            protect=Protect(
                self._count(core, "selection_constraints.core_experts.core_pos_top_m"),
                self._count(core, "selection_constraints.core_experts.core_count_top_m"), core.get("super_experts", "none"),
                self._count(core, "selection_constraints.core_experts.tag_top_m"),
            ),
            union=None if union is None else self._made(Union, union, "selection_constraints.union"),
            max_shard_gb=float(
                self._value(
                    writing, "structural_rewrite.max_shard_size_gb", MAX_SHARD_GB, lambda value: _is_number(value) and value > 0,
                    "a number of gigabytes",
                )
            ),
            model=self._path(source, "model_path"), statistics=tuple(files), ranking=self._path(source, "ranking"),
            scores=self._path(source, "scores_yaml"), num_experts=model.get("num_experts"), top_k=scoring.get("top_k"),
            notes={name: data[name] for name in data if name in _TAKEN_ALONG},
        )  # fmt: skip

    def second_shape(self, data: Mapping[str, Any], variant: str | None) -> Recipe:
        variants, keep = self._section(data, "variants"), self._section(data, "keep")
        names = [name for name in keep if name in variants] or list(keep)
        if variant is None and len(names) != 1:
            raise RecipeError(self.source, "variants", ", ".join(map(str, names)) or "none", "one, or --variant with it to choose")
        chosen = names[0] if variant is None else variant
        if chosen not in keep:
            raise RecipeError(self.source, "keep", f"no variant {chosen!r}", f"one of {', '.join(map(str, keep))}")
        constraints, profiling = self._section(data, "constraints"), self._section(data, "profiling")
        for name in ("top_k_unchanged", "keep_n_same_per_layer"):
            if constraints.get(name, True) is not True:
                raise RecipeError(
                    self.source, f"constraints.{name}", shortened(constraints[name]), "true, the only one that softprune runs"
                )
        entry = self._section(keep, chosen)
        multiple = self._same("keep_n_multiple_of", {"constraints": constraints, f"keep.{chosen}": entry})
        method, parameters = self._scoring({"method": data.get("method")}, profiling)
        return Recipe(
            name=f"{data.get('name', '')}/{chosen}", base_model=data.get("base_model"), method=method, parameters=parameters,
            budget=self._budget(entry, multiple, None, None), notes={"profiling_data": profiling},
        )  # fmt: skip

    def _scoring(self, scoring: Mapping[str, Any], profiling: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Method and parameters; the study's EAFT numbers stand in `scoring`, or in `eaft` under the profile."""
        known = {"method", "top_k", "entropy_topk", "weights", "score_key", "score_definition", "parameters", "tags", "normalise_tags"}
        self._only(scoring, "scoring", {*known, *_EAFT})
        eaft, weights = self._section(profiling, "eaft"), self._section(scoring, "weights")
        self._only(weights, "scoring.weights", set(_EAFT[2:]))
        self._only(eaft, "profiling_data.eaft", {"entropy_topk", *_EAFT})
        method = scoring.get("method") or ("eaft_reap" if eaft else None)
        method = None if method is None else ALIASES.get(method, method)
        if method is not None and method not in CRITERIA:
            raise RecipeError(self.source, "scoring.method", shortened(method), f"one of {', '.join(CRITERIA)}")
        parameters = dict(self._section(scoring, "parameters"))
        if method == "eaft_reap":
            for part in (scoring, weights, eaft):
                if part.get("entropy_topk", _ENTROPY_TOP) != _ENTROPY_TOP:
                    found = shortened(part["entropy_topk"])
                    raise RecipeError(self.source, "scoring.entropy_topk", found, f"{_ENTROPY_TOP}, which statistics are collected with")
                for name in _EAFT:
                    if name in part and float(parameters.setdefault(name, float(part[name]))) != float(part[name]):
                        raise RecipeError(self.source, f"scoring.{name}", shortened(part[name]), f"{parameters[name]}, as elsewhere in it")
        return method, parameters

    def _budget(self, model: Mapping[str, Any], multiple: Any, rounding: Any, backend: Any) -> dict[str, Any]:
        """A number that is given goes before the share that it was made from."""
        numbers = {"keep": self._value(model, "model.keep_n", None, _is_whole, "a whole number")}
        for name, field in (("compression_ratio", "compression_ratio"), ("keep_frac", "keep_frac_requested")):
            numbers[name] = self._value(model, f"model.{field}", None, lambda value: _is_number(value) or isinstance(value, str), "a share")
        budget = next(({name: value} for name, value in numbers.items() if value is not None), None)
        if budget is None:
            raise RecipeError(self.source, "model.keep_n", "nothing", "keep_n, keep_frac_requested or compression_ratio")
        given = {"rounding": rounding, "keep_multiple": multiple, "backend": backend}
        return {**budget, **{name: value for name, value in given.items() if value is not None}}

    def _value(self, section: Mapping[str, Any], field: str, default: Any, is_right: Callable[[Any], bool], expected: str) -> Any:
        """The value that the field's last part names in a section; the default where it is missing or null."""
        value = section.get(field.rpartition(".")[2])
        if value is None:
            return default
        if not is_right(value):
            raise RecipeError(self.source, field, shortened(value), expected)
        return value

    def _count(self, section: Mapping[str, Any], field: str) -> int:
        found: int = self._value(section, field, 0, lambda value: _is_whole(value) and value >= 0, "a whole number from 0 on")
        return found

    def _path(self, section: Mapping[str, Any], name: str) -> str | None:
        found: str | None = self._value(section, f"source.{name}", None, lambda value: isinstance(value, str), "a path")
        return found

    def _same(self, name: str, sections: Mapping[str, Mapping[str, Any]]) -> Any:
        """A value that may stand in several sections; refused where they differ."""
        found = {where: section[name] for where, section in sections.items() if section.get(name) is not None}
        if len(set(map(str, found.values()))) > 1:
            raise RecipeError(self.source, name, ", ".join(f"{value} in {where}" for where, value in found.items()), "one value")
        return next(iter(found.values()), None)

    def _section(self, data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        section = data.get(name)
        if section is None:
            return {}
        if not isinstance(section, dict):
            raise RecipeError(self.source, name, shortened(section), "a mapping")
        return section

    def _only(self, section: Mapping[str, Any], name: str, known: set[str]) -> None:
        for key in section:
            if key not in known and key not in _REMARKS:
                where = f"{name}.{key}" if name else str(key)
                raise RecipeError(self.source, where, "an unknown key", f"one of {', '.join(sorted(known))}")

    def _made(self, kind: type[Union], values: Any, field: str) -> Union:
        try:
            return kind(**values)
        except TypeError as error:
            raise RecipeError(self.source, field, shortened(values), f"coverage, core and normalise ({error})") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
