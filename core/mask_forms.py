"""Foreign forms of expert masks and rankings, read and turned into an `ExpertMask`.

| form | looks like | says |
|---|---|---|
| keep_by_layer | `{"keep_by_layer": {"0": [ids]}}` | which experts stay |
| list | `[[ids], [ids], …]` | which experts stay |
| expert_mapping | `{"0": {"<old id>": new id}}` (a rewritten checkpoint's expert_mapping.json) | which experts stay |
| reap_scores | REAP scores YAML, `schema_version: 1`, `kind: reap_scores`, `ranking_by_layer` or `layer_scores` | a ranking |
| topical | `{"think_expert_analytics": {"layer_0": [ids]}, …}`, of GPT-OSS-MoE-ExpertFingerprinting | a ranking |

A ranking becomes a mask by keeping its first N experts per layer, so these forms need `keep_n`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprune import mask as mask_file
from softprune.checkpoint.families import ModelSpec
from softprune.errors import MaskError, shortened
from softprune.mask import ExpertMask, MaskModel
from softprune.yaml_file import read_yaml

SECTIONS = {"think": "think_expert_analytics", "answer": "answer_expert_analytics"}


@dataclass(frozen=True)
class Reading:
    """What a foreign file says: `rows[i]` are expert ids of MoE layer i, kept ones or a whole ranking, best first."""

    form: str
    rows: list[Any]
    is_ranking: bool


def convert(
    path: str | Path,
    spec: ModelSpec,
    fingerprint: str | None,
    keep_n: int | None = None,
    section: str = "think",
    top_k: int | None = None,
) -> ExpertMask:
    """Read any known form as a mask for the given model.

    Args:
        path: the file; `.yaml` or `.yml` is read as YAML, all else as JSON.
        spec: the model's shape.
        fingerprint: the model's fingerprint to write into the mask, or None.
        keep_n: experts to keep per layer, for rankings.
        section: "think" or "answer", for topical rankings.
        top_k: experts per token to write into the mask; None for the model's own.

    Raises:
        MaskError: no known form, or the result breaks a rule.
    """
    source = str(path)
    data = _read(path)
    if isinstance(data, dict) and data.get("format") == mask_file.FORMAT:
        if keep_n is not None:
            raise MaskError(source, "", "an expert mask", "no --keep-n, which only a ranking can use")
        mask = ExpertMask.parse(data if top_k is None else {**data, "top_k": top_k}, source)
        mask.check_model(spec, source)
        return mask
    reading = _recognise(data, source, section)
    if reading.is_ranking and keep_n is None:
        raise MaskError(source, "", f"a ranking ({reading.form})", "--keep-n N with it, to say how many experts stay in each layer")
    if keep_n is not None and keep_n < 1:
        raise MaskError("--keep-n", "", str(keep_n), "at least 1")
    if not reading.is_ranking and keep_n is not None:
        raise MaskError(source, "", f"kept experts ({reading.form})", "no --keep-n, which only a ranking can use")
    keep = [_ids(row, f"{source}", f"layer {i}") for i, row in enumerate(reading.rows)]
    if keep_n is not None:
        for i, row in enumerate(keep):
            if len(row) < keep_n:
                raise MaskError(source, f"layer {i}", f"a ranking of {len(row)} experts", f"at least --keep-n = {keep_n}")
        keep = [row[:keep_n] for row in keep]
    return build(spec, keep, fingerprint, {"method": "convert", "form": reading.form, "file": Path(path).name}, source, top_k)


def ranking_of(path: str | Path, model: MaskModel, section: str = "think") -> tuple[str, list[list[int]]]:
    """A ranking file's form, and per MoE layer the ids that it ranks, best first; not all have to be ranked.

    Raises:
        MaskError: no ranking, another number of layers, or an id that the model does not have or that is given twice.
    """
    source = str(path)
    reading = _recognise(_read(path), source, section)
    if not reading.is_ranking:
        raise MaskError(source, "", f"kept experts ({reading.form})", "a ranking: REAP scores, or a topical ranking")
    rows = [_ids(row, source, f"layer {i}") for i, row in enumerate(reading.rows)]
    if len(rows) != model.num_layers:
        raise MaskError(source, "", f"{len(rows)} layers", f"{model.num_layers}, as the model has")
    for layer, row in enumerate(rows):
        if len(set(row)) != len(row) or not all(0 <= i < model.num_experts for i in row):
            raise MaskError(source, f"layer {layer}", shortened(row), f"ids from 0 to {model.num_experts - 1}, each at most once")
    return reading.form, rows


def build(
    spec: ModelSpec,
    keep: Sequence[Sequence[int] | None],
    fingerprint: str | None,
    provenance: dict[str, Any],
    source: str,
    top_k: int | None = None,
) -> ExpertMask:
    """A mask for a model from kept ids, checked against every rule.

    Raises:
        MaskError: a rule is broken; `source` is the file it names.
    """
    model = MaskModel.of(spec, fingerprint)
    document = {
        "format": mask_file.FORMAT, "version": mask_file.VERSION, "model": model.model_dump(),
        "keep": [None if row is None else list(row) for row in keep], "top_k": top_k, "provenance": provenance,
    }  # fmt: skip
    return ExpertMask.parse(document, source)


def _read(path: str | Path) -> Any:
    if Path(path).suffix.lower() not in (".yaml", ".yml"):
        return mask_file.read_json(path)
    return read_yaml(path, "a scores file", MaskError)


def _recognise(data: Any, source: str, section: str) -> Reading:
    if isinstance(data, list):
        return Reading("list", data, False)
    if isinstance(data, dict):
        if "keep_by_layer" in data:
            return Reading("keep_by_layer", _by_layer(data["keep_by_layer"], source, "keep_by_layer", ""), False)
        if data.get("kind") == "reap_scores":
            return Reading("reap_scores", _reap_rows(data, source), True)
        if set(data) & set(SECTIONS.values()):
            return Reading(f"topical/{section}", _by_layer(data.get(SECTIONS[section]), source, SECTIONS[section], "layer_"), True)
        if data and all(str(key).isdigit() and isinstance(value, dict) for key, value in data.items()):
            return Reading("expert_mapping", [_mapping_ids(row, source, i) for i, row in enumerate(_by_layer(data, source, "", ""))], False)
    raise MaskError(
        source, "", "no known form of mask",
        "a softprune mask, keep_by_layer, a list of lists, expert_mapping.json, REAP scores YAML or a topical ranking",
    )  # fmt: skip


def _by_layer(table: Any, source: str, field: str, prefix: str) -> list[Any]:
    """Values of `{prefix}0`, `{prefix}1`, … in order; every layer has to be there, and no other key."""
    if not isinstance(table, Mapping):
        raise MaskError(source, field, type(table).__name__, "an object with one entry a layer")
    table = {str(key): value for key, value in table.items()}
    rows = []
    for layer in range(len(table)):
        key = f"{prefix}{layer}"
        if key not in table:
            raise MaskError(
                source, field or "layers", f"{len(table)} entries but none named {key!r}", "one entry for each layer, numbered from 0"
            )
        rows.append(table[key])
    return rows


def _mapping_ids(row: Any, source: str, layer: int) -> list[int]:
    """Old ids of one layer of an expert_mapping.json; new ids have to be 0 … n-1."""
    field = f"layer {layer}"
    if not isinstance(row, Mapping) or not all(str(old).isdigit() for old in row):
        raise MaskError(source, field, type(row).__name__, "an object from old id to new id")
    new_ids = _ids(list(row.values()), source, field)
    if sorted(new_ids) != list(range(len(row))):
        raise MaskError(source, field, f"new ids {sorted(new_ids)}", f"the numbers from 0 to {len(row) - 1}, once each")
    return [int(old) for old in row]


def _reap_rows(data: Mapping[str, Any], source: str) -> list[Any]:
    if data.get("schema_version") != 1:
        raise MaskError(source, "schema_version", repr(data.get("schema_version")), "1")
    if isinstance(data.get("ranking_by_layer"), list):
        return list(data["ranking_by_layer"])
    layers = data.get("layer_scores")
    if not isinstance(layers, list) or not layers:
        raise MaskError(source, "ranking_by_layer", "nothing", "a ranking, or layer_scores to make one from")
    rows: dict[str, Any] = {}
    try:
        for entry in layers:
            # Higher is better; ties go to the smaller id.
            ranked = sorted(entry["experts"], key=lambda e: (-float(e["score"]), int(e["expert"])))
            rows[str(entry["layer"])] = [e["expert"] for e in ranked]
    except (KeyError, TypeError, ValueError) as error:
        raise MaskError(source, "layer_scores", f"an entry that is not readable ({error!r})", "layer, experts, expert, score") from None
    return _by_layer(rows, source, "layer_scores", "")


def _ids(row: Any, source: str, field: str) -> list[int]:
    if not isinstance(row, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in row):
        raise MaskError(source, field, shortened(row), "a list of expert ids")
    return row
