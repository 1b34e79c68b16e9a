"""The scores file: YAML of the study's `reap_scores`, schema version 1 (spec/metrics.md 6), with what selection needs beside it.

The study's readers find `ranking_by_layer` and `layer_scores` where they look for them. What it has no place for stands under
`softprune`: the model with its fingerprint, parameters, and scores of single tags. The study's own files are read, too; they don't say
which model they are for, so a model has to be given with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from softprune import __version__
from softprune.errors import shortened
from softprune.files import digest_of, write_whole
from softprune.mask import MaskModel
from softprune.ranking.errors import RankError
from softprune.ranking.scores import Scores
from softprune.yaml_file import read_yaml

KIND: Final = "reap_scores"
SCHEMA: Final = 1
_EXPECTED = "a scores file"
_PLAIN_KEY = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[a-z][a-z0-9_]*", re.IGNORECASE)


def dump(scores: Scores) -> str:
    """The file's text; the same scores give the same bytes."""
    return "\n".join(_lines(scores)) + "\n"


def named(scores: Scores, path: str | Path) -> Scores:
    """The scores, knowing the file that they are going to be in, and its hash."""
    return replace(scores, source=str(path), digest=digest_of(dump(scores).encode()))


def write(scores: Scores, path: str | Path) -> Scores:
    """Write a file; it appears whole or not at all.

    Returns:
        The scores, knowing their file and its hash.

    Raises:
        RankError: the file cannot be written.
    """
    try:
        write_whole(Path(path), dump(scores))
    except OSError as error:
        raise RankError(str(path), "", error.strerror or str(error), "a place that can be written") from None
    return named(scores, path)


def read(path: str | Path, model: MaskModel | None = None) -> Scores:
    """Read a file of ours, or of the study's.

    Args:
        path: the file.
        model: the model at hand; needed where the file does not name one, else compared with it.

    Raises:
        RankError: missing, no scores file, another model's, or a value that is not a number.
    """
    source, data = str(path), read_yaml(path, _EXPECTED, RankError)
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise RankError(source, "kind", shortened(data.get("kind") if isinstance(data, dict) else data), KIND)
    if data.get("schema_version") != SCHEMA or isinstance(data["schema_version"], bool):
        raise RankError(source, "schema_version", shortened(data.get("schema_version")), str(SCHEMA))
    own = data.get("softprune") or {}
    _require(isinstance(own, dict), source, "softprune", own, "a mapping")
    model = _model(own, model, source)
    columns = _columns(data, model, source)
    scores = Scores(
        str(data.get("method")), model, columns.pop("score"), str(data.get("score_key")), str(data.get("score_definition")),
        own.get("parameters") or {}, data.get("inputs") or {}, data.get("profile_meta") or {}, columns,
        {str(tag): _table(rows, model, source, f"softprune.by_tag.{tag}") for tag, rows in (own.get("by_tag") or {}).items()},
        source, digest_of(Path(path).read_bytes()),
    )  # fmt: skip
    given = data.get("ranking_by_layer")
    if given is not None and given != scores.ranking.tolist():
        _check_ranking(given, scores, source)
    return scores


def is_current(path: Path) -> bool:
    """Whether a file that can be read was written by this version of softprune, as it would write it."""
    return dump(read(path)) == path.read_text(encoding="utf-8")


def _lines(scores: Scores) -> Iterator[str]:
    """Block style outside, flow style (which is JSON) inside: one line for each expert."""
    yield f"schema_version: {SCHEMA}"
    yield f"kind: {KIND}"
    for name, value in (
        ("method", scores.method), ("score_key", scores.score_key), ("score_definition", scores.definition),
        ("inputs", dict(scores.inputs)), ("profile_meta", dict(scores.found)),
        ("summary", {"num_layers": scores.model.num_layers, "num_experts": scores.model.num_experts}),
    ):  # fmt: skip
        yield f"{name}: {_flow(value)}"
    yield "softprune:"
    yield f"  version: {_flow(__version__)}"
    yield f"  model: {_flow(scores.model.model_dump())}"
    yield f"  parameters: {_flow(dict(scores.parameters))}"
    yield "  by_tag:" if scores.by_tag else "  by_tag: {}"
    for tag, values in scores.by_tag.items():
        yield f"    {_flow(tag)}:"
        yield from (f"    - {_flow(row)}" for row in values.tolist())
    ranking = scores.ranking.tolist()
    yield "ranking_by_layer:"
    yield from (f"- {_flow(row)}" for row in ranking)
    yield "layer_scores:"
    for layer, row in enumerate(ranking):
        yield f"- layer: {layer}"
        yield "  experts:"
        for expert in row:
            entry = {"expert": expert, "score": float(scores.values[layer, expert])}
            entry |= {name: _number(column[layer, expert]) for name, column in scores.columns.items()}
            yield f"  - {_flow(entry)}"


def _flow(value: Any) -> str:
    """A value on one line. Floats keep a dot: YAML 1.1 takes 1e-05 for text."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def _key(key: Any) -> str:
    return str(key) if _PLAIN_KEY.fullmatch(str(key)) else json.dumps(str(key))


def _number(value: Any) -> int | float:
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _model(own: Mapping[str, Any], given: MaskModel | None, source: str) -> MaskModel:
    if "model" not in own:
        if given is None:
            raise RankError(source, "softprune.model", "nothing", "the model's shape in it, or --model with it")
        return given
    try:
        model = MaskModel.model_validate(own["model"])
    except ValidationError as error:
        raise RankError(source, "softprune.model", shortened(own["model"]), error.errors()[0]["msg"]) from None
    if given is not None:
        for name, found in model.model_dump().items():
            expected = getattr(given, name)
            if found != expected and None not in (found, expected):
                raise RankError(source, f"softprune.model.{name}", str(found), f"{expected}, as the model has")
    return model


def _columns(data: Mapping[str, Any], model: MaskModel, source: str) -> dict[str, NDArray[np.float64]]:
    """All quantities of `layer_scores` that every expert has, [num_layers, num_experts]."""
    layers: Any = data.get("layer_scores")
    _require(isinstance(layers, list), source, "layer_scores", layers, "a list with one entry for each layer")
    found: dict[str, NDArray[np.float64]] = {}
    seen = np.zeros((model.num_layers, model.num_experts), bool)
    numbers: dict[str, int] = {}
    for i, layer in enumerate(layers):
        entries: Any = layer.get("experts") if isinstance(layer, dict) else None
        row = layer.get("layer") if isinstance(layer, dict) else None
        _require(_is_id(row, model.num_layers), source, f"layer_scores[{i}].layer", row, f"from 0 to {model.num_layers - 1}")
        _require(isinstance(entries, list), source, f"layer_scores[{i}].experts", entries, "a list with one entry for each expert")
        for j, entry in enumerate(entries):
            field = f"layer_scores[{i}].experts[{j}]"
            expert = entry.get("expert") if isinstance(entry, dict) else None
            _require(_is_id(expert, model.num_experts), source, f"{field}.expert", expert, f"from 0 to {model.num_experts - 1}")
            _require(not seen[row, expert], source, f"{field}.expert", expert, "each expert of a layer once")
            _require("score" in entry, source, f"{field}.score", None, "a number")
            seen[row, expert] = True
            for name, value in entry.items():
                if name == "expert":
                    continue
                right = isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
                _require(right, source, f"{field}.{name}", value, "a finite number")
                found.setdefault(name, np.zeros(seen.shape))[row, expert] = value
                numbers[name] = numbers.get(name, 0) + 1
    if not seen.all():
        layer, expert = np.argwhere(~seen)[0]
        raise RankError(source, "layer_scores", f"no score of expert {expert} in layer {layer}", f"all {seen.size} experts")
    return {name: values for name, values in found.items() if numbers[name] == seen.size}


def _check_ranking(given: Any, scores: Scores, source: str) -> None:
    """Refuse a ranking that contradicts the scores; equal scores may stand in any order."""
    size = (scores.model.num_layers, scores.model.num_experts)
    try:
        order = np.asarray(given, dtype=np.int64)
    except (TypeError, ValueError):
        order = np.zeros(0, np.int64)
    if order.shape != size or not np.array_equal(np.sort(order, -1), np.broadcast_to(np.arange(size[1]), size)):
        raise RankError(source, "ranking_by_layer", shortened(given), f"{size[0]} lists of the ids from 0 to {size[1] - 1}")
    ranked = np.take_along_axis(scores.values, order, -1)
    wrong = np.argwhere(np.diff(ranked, axis=-1) > 0)
    if len(wrong):
        layer, place = wrong[0]
        better, worse = order[layer, place + 1], order[layer, place]
        raise RankError(
            source, f"ranking_by_layer[{layer}]", f"expert {worse} before {better}, whose score is higher", "the order of layer_scores"
        )


def _table(rows: Any, model: MaskModel, source: str, field: str) -> NDArray[np.float64]:
    size = (model.num_layers, model.num_experts)
    try:
        values = np.asarray(rows, np.float64)
    except (TypeError, ValueError):
        values = np.zeros(0)
    if values.shape != size or not np.isfinite(values).all():
        raise RankError(source, field, shortened(rows), f"{size[0]} lists of {size[1]} finite numbers")
    return values


def _is_id(value: Any, number: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < number


def _require(holds: bool, source: str, field: str, found: object, expected: str) -> None:
    if not holds:
        raise RankError(source, field, "nothing" if found is None else shortened(found), expected)
