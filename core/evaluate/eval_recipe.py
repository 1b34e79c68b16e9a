"""Recipes of evaluations, in the study's shapes (spec/metrics.md 6): a base, and recipes that extend it.

The sections that say what is scored and how are read strictly, so that a misspelt key does not silently change an evaluation. Paths of
programs, environments of engines, places of models and commands belong to whoever runs the engines: they are passed over, never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from softprune.errors import InputError, shortened
from softprune.evaluate.eval_packs import Sizes
from softprune.evaluate.metrics import MetricSettings
from softprune.evaluate.packing import UNION
from softprune.recipe.recipe import SCHEMA
from softprune.yaml_file import read_yaml

Side = Literal["left", "right"]
_PASSED_OVER = {
    "schema_version", "kind", "name", "description", "status", "paths", "engine_defaults", "execution", "execution_notes",
    "expected_outputs",
}  # fmt: skip
_READ = {"extends", "calib_packs", "eaft", "collector_defaults", "collector_overrides", "run_matrix", "pair", "model"}
_EAFT: dict[str, type] = {"entropy_topk": int, "cc_quantile": float, "prob_scale": str, "logp_min": float, "logp_max": float}
_COLLECTOR: dict[str, type] = {
    "top_k": int, "sample_points": int, "batch_size": int, "num_blocks": int, "seq_lens_csv": str, "token_budget": int, "block_form": str,
}  # fmt: skip
_SIZES = {"num_blocks", "token_budget"}
_MODEL = {"label", "model_id", "model_path", "model_path_from_manifest"}
_NAMES = {int: "a whole number", float: "a number", str: "a text"}


class EvalRecipeError(InputError):
    """A recipe of an evaluation that cannot be read."""


@dataclass(frozen=True)
class EvalRun:
    """One evaluation that is asked for.

    Attributes:
        name: in the recipe's matrix; "" where it has none.
        packs: Parquet files.
        column: that holds the conversations.
        union_name: that UNION goes by.
        sizes, metrics: see there.
        concurrency: requests at once, the study's batch_size; None where nobody says.
        top_k: experts of each token that the server has to have; None for whatever it has.
        label: of the model.
    """

    name: str = ""
    packs: tuple[Path, ...] = ()
    column: str = "text"
    union_name: str = UNION
    sizes: Sizes = field(default_factory=Sizes)
    metrics: MetricSettings = field(default_factory=MetricSettings)
    concurrency: int | None = None
    top_k: int | None = None
    label: str | None = None


def read_eval_recipe(path: Path, side: Side | None = None) -> list[EvalRun]:
    """Read a recipe and what it extends.

    Args:
        path: the file.
        side: which model of a pair the server serves.

    Raises:
        EvalRecipeError: missing, no recipe, or a key or value that it cannot have.
        EvaluationError, InputError: settings that nothing can be measured with.
    """
    data, reader = _extended(path, ()), _Reader(str(path))
    reader.only(data, "", _READ | _PASSED_OVER)
    matrix = data.get("run_matrix")
    if matrix is None:
        return [reader.run(data, "", {}, side)]
    if not isinstance(matrix, list) or not matrix:
        raise EvalRecipeError(str(path), "run_matrix", shortened(matrix), "a list of runs")
    runs: dict[str, EvalRun] = {}
    for i, entry in enumerate(matrix):
        at = f"run_matrix[{i}]"
        reader.only(reader.mapping(entry, at), at, {"name", "collector_overrides", "engine_overrides"})
        name = entry.get("name")
        # It becomes a part of a file's name.
        if not isinstance(name, str) or name in runs or not name.translate({ord(one): None for one in "._-"}).isalnum():
            raise EvalRecipeError(str(path), f"{at}.name", shortened(name), "a name of its own, of letters, digits, '.', '-' and '_'")
        runs[name] = reader.run(data, name, entry.get("collector_overrides"), side)
    return list(runs.values())


def seq_lens_of(text: str, source: str = "--seq-lens") -> tuple[int, ...]:
    """Block lengths from "1024,2048".

    Raises:
        InputError: none, or no numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise InputError(source, "", shortened(text), "lengths and commas, e.g. 1024,2048")
    return tuple(int(part) for part in parts)


def _extended(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A file's sections over those of the file that it extends: key by key in a mapping, whole where it is a list."""
    source = str(path)
    if path.resolve() in seen:
        raise EvalRecipeError(source, "extends", "a file that extends itself", "a base that extends none of those before it")
    data = read_yaml(path, "a recipe of an evaluation", EvalRecipeError)
    if not isinstance(data, dict):
        raise EvalRecipeError(source, "", type(data).__name__, "a recipe of an evaluation")
    number = data.get("schema_version", SCHEMA)
    if number != SCHEMA or isinstance(number, bool):
        raise EvalRecipeError(source, "schema_version", shortened(number), str(SCHEMA))
    packs = data.get("calib_packs")
    if isinstance(packs, dict) and isinstance(packs.get("pack_files"), list):
        # Relative to the file that names them.
        data["calib_packs"] = {**packs, "pack_files": [str(path.parent / str(file)) for file in packs["pack_files"]]}
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise EvalRecipeError(source, "extends", shortened(base), "the path of a recipe, relative to this one")
    below = _extended(path.parent / base, (*seen, path.resolve()))
    both = {name for name in data if isinstance(data[name], dict) and isinstance(below.get(name), dict)}
    return {**below, **data, **{name: _over(below[name], data[name]) for name in both}}


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A later layer over another; of the two ways to say how much is scored, its own takes the place of either."""
    says_how_much = any(above.get(key) is not None for key in _SIZES)
    return {key: value for key, value in below.items() if not (says_how_much and key in _SIZES)} | dict(above)


class _Reader:
    """Takes sections apart; errors name the file and the field."""

    def __init__(self, source: str) -> None:
        self.source = source

    def run(self, data: Mapping[str, Any], name: str, overrides: Any, side: Side | None) -> EvalRun:
        packs = self.mapping(data.get("calib_packs"), "calib_packs")
        self.only(packs, "calib_packs", {"dataset_repo", "text_column", "pack_files", "derived_union_name"})
        files = packs.get("pack_files") or []
        if not isinstance(files, list):
            raise EvalRecipeError(self.source, "calib_packs.pack_files", shortened(files), "a list of Parquet files")
        eaft = self._typed(data.get("eaft"), "eaft", _EAFT)
        collector: dict[str, Any] = {}
        for section, at in (
            (data.get("collector_defaults"), "collector_defaults"), (data.get("collector_overrides"), "collector_overrides"),
            (overrides, f"run_matrix.{name}.collector_overrides"),
        ):  # fmt: skip
            layer = self._typed(section, at, _COLLECTOR)
            if layer.keys() >= _SIZES:
                raise EvalRecipeError(self.source, f"{at}.token_budget", "num_blocks as well", "one of the two")
            collector = _over(collector, layer)
        if "seq_lens_csv" in collector:
            collector["seq_lens"] = seq_lens_of(collector["seq_lens_csv"], f"{self.source}: seq_lens_csv")
        if "block_form" in collector:
            collector["form"] = collector["block_form"]
        sizes = {name: collector[name] for name in ("seq_lens", "num_blocks", "token_budget", "form") if name in collector}
        points = {name: collector[name] for name in ("sample_points",) if name in collector}
        return EvalRun(
            name, tuple(Path(str(file)) for file in files), str(packs.get("text_column", "text")),
            str(packs.get("derived_union_name", UNION)), Sizes(**sizes), MetricSettings(**eaft, **points), collector.get("batch_size"),
            collector.get("top_k"), self._label(data, side),
        )  # fmt: skip

    def mapping(self, value: Any, at: str) -> Mapping[str, Any]:
        """The section, {} where there is none."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise EvalRecipeError(self.source, at, shortened(value), "a mapping")
        return value

    def only(self, section: Mapping[str, Any], at: str, known: set[str]) -> None:
        """Refuse keys that nobody understands; notes are always welcome."""
        for key in section:
            if key not in known and key not in ("note", "notes"):
                where = f"{at}.{key}" if at else str(key)
                raise EvalRecipeError(self.source, where, "an unknown key", f"one of {', '.join(sorted(known))}")

    def _label(self, data: Mapping[str, Any], side: Side | None) -> str | None:
        pair = self.mapping(data.get("pair"), "pair")
        self.only(pair, "pair", {"left", "right"})
        if pair and side is None:
            raise EvalRecipeError(self.source, "pair", " and ".join(pair), "--side left or --side right, whichever the server serves")
        if side is not None and side not in pair:
            raise EvalRecipeError("--side", "", side, f"none: {self.source} has no pair.{side}")
        at = "model" if side is None else f"pair.{side}"
        chosen = self.mapping(data.get("model") if side is None else pair[side], at)
        self.only(chosen, at, _MODEL)
        label = chosen.get("label") or chosen.get("model_id")
        return None if label is None else str(label)

    def _typed(self, section: Any, at: str, kinds: Mapping[str, type]) -> dict[str, Any]:
        given = self.mapping(section, at)
        self.only(given, at, set(kinds))
        found: dict[str, Any] = {}
        for key, kind in kinds.items():
            if (value := given.get(key)) is None:
                continue
            if type(value) is int and (kind is float or key == "seq_lens_csv"):
                value = kind(value)
            low = 0 if key == "sample_points" else 1
            if type(value) is not kind or (isinstance(value, int) and value < low):
                raise EvalRecipeError(self.source, f"{at}.{key}", shortened(value), _NAMES[kind])
            found[key] = value
        return found
