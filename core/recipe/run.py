"""Running a recipe: scores, mask, checkpoint, proof. A step whose result is there, and is what it would make, is skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprune.checkpoint.manifest import Manifest, read_manifest
from softprune.checkpoint.plan import plan_rewrite
from softprune.checkpoint.rewrite import execute
from softprune.checkpoint.side_files import MANIFEST
from softprune.checkpoint.verify import verify_checkpoint
from softprune.errors import SoftpruneError
from softprune.files import digest_of_file
from softprune.mask import ExpertMask, MaskModel
from softprune.ranking import scores_file
from softprune.ranking.api import model_of_checkpoint, parameters_said, rank
from softprune.ranking.errors import RankError
from softprune.ranking.registry import criterion
from softprune.ranking.scores import Scores
from softprune.ranking.tags import TagWeights
from softprune.recipe.errors import RecipeError
from softprune.recipe.lock import check_lock, lock_of, lock_path, read_lock, write_lock
from softprune.recipe.recipe import Recipe
from softprune.selection.select import select

Progress = Callable[[str, int], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Places:
    """Where a run finds things, and where it puts them.

    Attributes:
        recipe: the recipe's file.
        model: folder of the model.
        out: folder of the smaller checkpoint.
        statistics, ranking, scores: files to rank from, or ready-made scores.
    """

    recipe: Path
    model: Path
    out: Path
    statistics: tuple[Path, ...] = ()
    ranking: Path | None = None
    scores: Path | None = None

    def beside(self, ending: str) -> Path:
        """A file beside the checkpoint: OUT.scores.yaml, OUT.mask.json."""
        return self.out.with_name(self.out.name + ending)

    @classmethod
    def of(
        cls, recipe: Recipe, file: Path, model: Path | None = None, out: Path | None = None, statistics: tuple[Path, ...] = (),
        ranking: Path | None = None,
    ) -> Places:  # fmt: skip
        """What is given goes before what the recipe says, which is relative to its folder.

        Raises:
            RecipeError: nobody says where the model is.
        """
        folder = file.parent
        chosen = model or (folder / recipe.model if recipe.model else None)
        if chosen is None:
            raise RecipeError(str(file), "source.model_path", "nothing", "the model's folder in it, or --model with it")
        name = recipe.name.replace("/", "_") or file.stem
        return cls(
            file, chosen, out or folder / name, statistics or tuple(folder / path for path in recipe.statistics),
            ranking or (folder / recipe.ranking if recipe.ranking else None), folder / recipe.scores if recipe.scores else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """Model, scores and mask of a recipe, and the lock that pins them; None if there was no lock."""

    model: MaskModel
    scores: Scores
    mask: ExpertMask
    pinned: dict[str, Any] | None


@dataclass(frozen=True)
class Outcome:
    """What a run made, or found made: folder, scores, mask, and lock."""

    out: Path
    scores: Scores
    mask: ExpertMask
    lock: dict[str, Any]


def run(
    recipe: Recipe, places: Places, tell: Tell = lambda text: None, progress: Progress = lambda name, num_bytes: None,
) -> Outcome:  # fmt: skip
    """Go from statistics to a verified checkpoint.

    Args:
        recipe: what to do.
        places: where.
        tell: told in words what each step did, or that it was skipped.
        progress: told of (what is read or written, bytes).

    Raises:
        RecipeError: the lockfile beside the recipe does not allow it, or something else has the checkpoint's name.
        SoftpruneError: a step failed; nothing half-written has the checkpoint's name.
    """
    return make(recipe, places, choose(recipe, places, tell, progress), tell, progress)


def choose(
    recipe: Recipe, places: Places, tell: Tell = lambda text: None, progress: Progress = lambda name, num_bytes: None
) -> Chosen:  # fmt: skip
    """The first half of `run`: rank and select, and write scores and mask."""
    model = _model(recipe, places)
    scores, mask = _chosen(recipe, places, model, tell, progress)
    pinned = _pinned(recipe, places, model, scores, mask, tell)
    _write(places, scores, mask, tell)
    return Chosen(model, scores, mask, pinned)


def make(
    recipe: Recipe, places: Places, chosen: Chosen, tell: Tell = lambda text: None, progress: Progress = lambda name, num_bytes: None
) -> Outcome:  # fmt: skip
    """The second half of `run`: rewrite, verify, and lock."""
    model, scores, mask, pinned = chosen.model, chosen.scores, chosen.mask, chosen.pinned
    if places.out.exists():
        _check_there(recipe, places, model, mask, progress)
        tell(f"rewrite: skipped, {places.out} is there; verified again, byte for byte")
    else:
        plan = plan_rewrite(places.model, mask, "mask", recipe.max_shard_bytes)
        execute(plan, places.out, recipe=places.recipe, base_model=recipe.base_model, progress=progress)
        tell(f"rewrite: {places.out}, {mask.summary}, {plan.bytes_written:,} bytes; verified byte for byte")
    lock = lock_of(recipe, places.recipe, places.model, model, scores, mask, places.out)
    path = lock_path(places.recipe)
    if pinned is None:
        write_lock(lock, path)
        tell(f"lock: {path}")
    else:
        check_lock(pinned, lock, path)
        if (pinned.get("outputs") or {}).get("manifest") is None:
            write_lock(lock, path)
        tell(f"lock: {path} holds")
    return Outcome(places.out, scores, mask, lock)


def lock(
    recipe: Recipe, places: Places, tell: Tell = lambda text: None, progress: Progress = lambda name, num_bytes: None
) -> dict[str, Any]:
    """Rank and select, and pin everything in the lockfile, the checkpoint too if it is there; an older lock is replaced.

    Raises:
        SoftpruneError: something cannot be read, or the checkpoint that is there is another.
    """
    model = _model(recipe, places)
    scores, mask = _chosen(recipe, places, model, tell, progress)
    if places.out.exists():
        _check_there(recipe, places, model, mask, progress)
    _write(places, scores, mask, tell)
    found = lock_of(recipe, places.recipe, places.model, model, scores, mask, places.out)
    write_lock(found, lock_path(places.recipe))
    return found


def _model(recipe: Recipe, places: Places) -> MaskModel:
    model = model_of_checkpoint(places.model)
    for field, said, found in (("model.num_experts", recipe.num_experts, model.num_experts), ("scoring.top_k", recipe.top_k, model.top_k)):
        if said is not None and said != found:
            raise RecipeError(str(places.recipe), field, str(said), f"{found}, as {places.model} has")
    return model


def _scores(recipe: Recipe, places: Places, model: MaskModel, progress: Progress) -> Scores:
    """Ready-made ones; or those of an earlier run, if they were made of the same; or new ones."""
    if recipe.method is None or (places.scores is not None and not places.statistics):
        if places.scores is None:
            raise RecipeError(str(places.recipe), "scoring.method", "nothing", "a method, or source.scores_yaml")
        return scores_file.read(places.scores, model)
    path = places.beside(".scores.yaml")
    if path.is_file() and (known := _known(recipe, places, model, path)) is not None:
        return known
    scores = rank(
        list(places.statistics) or None, recipe.method, model=model, checkpoint=places.model, ranking=places.ranking, tags=recipe.tags,
        normalise_tags=recipe.normalise_tags, progress=progress, **recipe.parameters,
    )  # fmt: skip
    return scores_file.named(scores, path)


def _known(recipe: Recipe, places: Places, model: MaskModel, path: Path) -> Scores | None:
    """Scores that are there, if the same files, parameters and version of softprune would give them."""
    try:
        scores = scores_file.read(path, model)
    except RankError:
        return None
    assert recipe.method is not None
    chosen = criterion(recipe.method, recipe.parameters)
    wanted = parameters_said(chosen, TagWeights(recipe.tags, recipe.normalise_tags))
    read = {"statistics": places.statistics, "ranking": () if places.ranking is None else (places.ranking,)}.get(chosen.reads, ())
    hashes = [digest_of_file(file) for file in read]
    own: Any = scores.inputs.get("ranking" if chosen.reads == "ranking" else "statistics") or []
    listed = [entry["sha256"] for entry in ([own] if isinstance(own, dict) else own)]
    return scores if (dict(scores.parameters), listed) == (wanted, hashes) and scores_file.is_current(path) else None


def _chosen(recipe: Recipe, places: Places, model: MaskModel, tell: Tell, progress: Progress) -> tuple[Scores, ExpertMask]:
    """Scores and mask, not yet written."""
    scores = _scores(recipe, places, model, progress)
    budget = dict(recipe.budget)
    mask = select(
        scores, budget.pop("keep", None), protect=recipe.protect, union=recipe.union, target="checkpoint", recipe=recipe.name, **budget
    )
    # As the Hub's metadata name them.
    return scores, mask.model_copy(update={"provenance": {**mask.provenance, "datasets": recipe.datasets}}) if recipe.datasets else mask


def _write(places: Places, scores: Scores, mask: ExpertMask, tell: Tell) -> None:
    """Scores and mask, beside the checkpoint; what is there already is left alone."""
    places.out.parent.mkdir(parents=True, exist_ok=True)
    path = Path(scores.source)
    if path != places.beside(".scores.yaml"):
        tell(f"rank: skipped, scores are given ({path})")
    elif path.is_file() and digest_of_file(path) == scores.digest:
        tell(f"rank: skipped, {path} is there and was made of the same")
    else:
        scores_file.write(scores, path)
        tell(f"rank: {path}, {scores.method} ({scores.score_key})")
    path = places.beside(".mask.json")
    if path.is_file() and path.read_text(encoding="utf-8") == mask.dump():
        tell(f"select: skipped, {path} is there and is the same")
    else:
        mask.save(path)
        tell(f"select: {path}, {mask.summary}, {mask.hash[:19]}…")


def _pinned(recipe: Recipe, places: Places, model: MaskModel, scores: Scores, mask: ExpertMask, tell: Tell) -> dict[str, Any] | None:
    """The lock beside the recipe, held against what is about to be done; None if there is none."""
    path = lock_path(places.recipe)
    if not path.is_file():
        return None
    pinned, found = read_lock(path), lock_of(recipe, places.recipe, places.model, model, scores, mask, places.out)
    for remark in check_lock(pinned, {**found, "outputs": {**found["outputs"], "manifest": None, "files": None}}, path):
        tell(f"lock: {remark}")
    return pinned


def _check_there(recipe: Recipe, places: Places, model: MaskModel, mask: ExpertMask, progress: Progress) -> None:
    """Refuse a checkpoint that this run would not have made, or that was changed.

    Raises:
        RecipeError: it is another.
        SoftpruneError: it was changed.
    """
    other = "another place with --out, or this one removed"
    if not (places.out / MANIFEST).is_file():
        raise RecipeError(str(places.out), "", "something that no rewrite made", other)
    manifest: Manifest = read_manifest(places.out)
    for field, found, expected in (
        ("mask", manifest.mask_hash, mask.hash), ("base.fingerprint", manifest.base.fingerprint, model.fingerprint),
        ("max_shard_bytes", manifest.max_shard_bytes, recipe.max_shard_bytes), ("layers", manifest.layers, None),
        ("recipe", manifest.recipe, digest_of_file(places.recipe)),
    ):  # fmt: skip
        if found != expected:
            raise RecipeError(str(places.out / MANIFEST), field, str(found), f"{expected}, which this recipe makes; {other}")
    problems: list[SoftpruneError] = verify_checkpoint(places.model, places.out, progress=progress).problems
    if problems:
        raise problems[0]
