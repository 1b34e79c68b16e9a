"""`softprune.prune`: one call from a model to a smaller one, as users of REAP know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softprune.files import write_whole
from softprune.ranking.criterion import FromStatistics
from softprune.ranking.registry import criterion
from softprune.recipe.errors import RecipeError
from softprune.recipe.lock import lock_path
from softprune.recipe.recipe import MAX_SHARD_GB, Recipe
from softprune.recipe.run import Outcome, Places, run
from softprune.selection.select import Protect, Union

COMPRESSION_RATIO = 0.5
"""Share of the experts that goes if nobody says how many, REAP's default."""


def prune(
    model: str | Path,
    out: str | Path,
    method: str = "reap",
    *,
    keep: int | None = None,
    keep_frac: float | str | None = None,
    compression_ratio: float | str | None = None,
    stats: str | Path | Sequence[str | Path] | None = None,
    packs: Sequence[str | Path] = (),
    collect: Mapping[str, Any] | None = None,
    ranking: str | Path | None = None,
    tags: Mapping[str, float] | None = None,
    normalise_tags: bool = False,
    keep_multiple: int | None = None,
    backend: str | None = None,
    protect: Protect | None = None,
    union: Union | None = None,
    max_shard_gb: float = MAX_SHARD_GB,
    base_model: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int], None] = lambda name, num_bytes: None,
    **parameters: Any,
) -> Outcome:
    """Rank, select, rewrite and verify.

    The recipe of it is written beside the checkpoint (OUT.recipe.yaml) and taken along in it, so that `softprune run` can do the same.

    Args:
        model, out: folders; `out` must not exist, or be what this call makes.
        method, parameters: the criterion and its parameters.
        keep, keep_frac, compression_ratio: how many experts stay or go, one of them; half go if none is given.
        stats: statistics files, for methods that rank by statistics.
        packs: packs to collect them from, by the engine that is installed; see `collected`.
        collect: keyword arguments of `softprune.recipe.collect.collect_from_packs`, e.g. num_blocks.
        ranking: file, for `topical`.
        tags, normalise_tags: see `softprune.rank`.
        keep_multiple, backend, protect, union: see `softprune.select`.
        max_shard_gb: largest shard in decimal GB.
        base_model: the base model's Hub name, for the card.
        tell, progress: see `softprune.recipe.run.run`.

    Raises:
        RecipeError: no statistics for a method that ranks by them.
        SoftpruneError: a step failed.
    """
    chosen, out = criterion(method, parameters), Path(out)
    files = (stats,) if isinstance(stats, (str, Path)) else tuple(stats or ())
    if packs:
        files = (collected(model, out, packs, method, files, tell=tell, **(collect or {})),)
    if chosen.reads == "statistics" and not files:
        raise RecipeError("--stats", "", "no statistics", f"statistics files, by which {method} ranks, or packs to collect them from")
    if keep is None and keep_frac is None and compression_ratio is None:
        compression_ratio = COMPRESSION_RATIO
    budget = {
        "keep": keep, "keep_frac": keep_frac, "compression_ratio": compression_ratio, "keep_multiple": keep_multiple, "backend": backend,
    }  # fmt: skip
    recipe = Recipe(
        name=out.name, base_model=base_model, method=method, parameters=parameters, tags=dict(tags or {}), normalise_tags=normalise_tags,
        budget={name: value for name, value in budget.items() if value is not None}, protect=protect or Protect(), union=union,
        max_shard_gb=max_shard_gb, statistics=tuple(Path(file).name for file in files),
        ranking=None if ranking is None else Path(ranking).name,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(out.name + ".recipe.yaml")
    text = recipe.dump()
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        if out.exists():
            raise RecipeError(str(out), "", "a folder that other settings made", "another place with --out, or this one removed")
        # It pins what other settings made, which is gone.
        lock_path(file).unlink(missing_ok=True)
        write_whole(file, text)
    places = Places(file, Path(model), out, tuple(Path(path) for path in files), None if ranking is None else Path(ranking))
    return run(recipe, places, tell, progress)


def collected(
    model: str | Path, out: Path, packs: Sequence[str | Path], method: str, stats: Sequence[str | Path] = (), **options: Any
) -> Path:
    """Statistics that an engine collects from packs for a method; they lie beside the checkpoint.

    Args:
        model, out, packs, method, stats: as `prune` takes them; `stats` are refused, since a file holds either.
        **options: of `softprune.recipe.collect.collect_from_packs`.

    Raises:
        SoftpruneError: as that, or a method that reads no statistics.
    """
    from softprune.recipe.collect import collect_from_packs  # Transformers, which takes a second to import

    chosen = criterion(method)
    if stats:
        raise RecipeError("--packs", "", "--stats as well", "one of the two")
    if not isinstance(chosen, FromStatistics):
        raise RecipeError("--packs", "", f"method {method}, which reads no statistics", "a method that ranks by them")
    path = out.with_name(out.name + ".stats.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    collect_from_packs(Path(model), [Path(pack) for pack in packs], path, chosen.mode, **options)
    return path
