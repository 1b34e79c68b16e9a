"""What a server was asked for at launch, the same for every engine, and its check against the model.

An extension turns its flags into a `LaunchRequest`, resolves it in the front-end process, where a
mistake costs a second, and ships it to every worker process, which reads the mask again and refuses
if the file is no longer the one that was checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from softprune import mask as mask_file
from softprune.checkpoint.families import SPEC_FIELDS, ModelSpec, spec_of
from softprune.checkpoint.fingerprint import fingerprint_of_checkpoint
from softprune.errors import MaskError, RefusedError
from softprune.mask import ExpertMask
from softprune.mask_state import MaskState, read_state
from softprune.stats.header import MODES

TOP_K_FIELDS = ("num_experts_per_tok", "experts_per_token")
"""Names of top_k in config.json; gpt-oss has both."""

DEFAULT_MAX_TAGS, MAX_TAGS = 8, 64
"""Tags of a server's statistics."""


class LaunchRequest(BaseModel):
    """What a user asks of one server. Plain JSON, as it stands in flags and in an engine's own configuration.

    Attributes:
        expert_mask: path of the mask file, or None for no mask.
        expert_top_k: experts per token, or None for the mask's, else the model's own.
        expert_mask_force: use a mask made for other weights.
        expert_mask_state: path of the file that keeps a live mask across restarts; where it exists, it decides.
        control: serve the control API even where nothing else is asked for.
        debug_routes: count what the routers select.
        stats: mode of the statistics that may be collected, or None: then nothing of it is in place.
        max_tags: tags, "default" among them, that statistics are kept apart by; None for 8.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    expert_mask: str | None = None
    expert_top_k: int | None = None
    expert_mask_force: bool = False
    expert_mask_state: str | None = None
    control: bool = False
    debug_routes: bool = False
    stats: str | None = None
    max_tags: int | None = None

    @classmethod
    def parse(cls, data: Any, source: str) -> Self:
        """From a configuration object.

        Raises:
            RefusedError: an unknown field or a wrong type.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise RefusedError(f"{source}: {field}: found {first['input']!r}; expected {first['msg']}") from None

    def resolve(self, config: Mapping[str, Any], model: str) -> Launch:
        """Check the request against a model's config.json and add what follows from it.

        Args:
            config: the model's own config, before any override.
            model: the checkpoint folder or Hub name, as given.

        Raises:
            MaskError, CheckpointError: the mask cannot be used for this model.
            RefusedError: `expert_top_k` is out of range or contradicts the mask's; the state file's folder cannot be written.
        """
        spec = spec_of(config, f"{model}/config.json")
        self._check_stats()
        if self.expert_mask_state is not None:
            folder = Path(self.expert_mask_state).absolute().parent
            if not os.access(folder, os.W_OK | os.X_OK):
                raise RefusedError(f"--expert-mask-state: found {self.expert_mask_state}; expected a file in a folder that can be written")
        mask, kept_top_k = self._start()
        if mask is not None:
            mask.check_model(spec, self.mask_source)
            if Path(model).is_dir():
                mask.check_fingerprint(fingerprint_of_checkpoint(model), self.mask_source, self.expert_mask_force)
        return Launch(
            **self.model_dump(exclude={"expert_mask", "expert_mask_state"}),
            expert_mask=_absolute(self.expert_mask),
            expert_mask_state=_absolute(self.expert_mask_state),
            mask_hash=mask.hash if mask else None,
            top_k=self._top_k(mask, kept_top_k, spec),
            model_top_k=spec.top_k,
        )

    @property
    def num_tags(self) -> int:
        """Tags that statistics are kept apart by."""
        return self.max_tags or DEFAULT_MAX_TAGS

    def _check_stats(self) -> None:
        if self.stats not in (None, *MODES):
            raise RefusedError(f"--softprune-stats: found {self.stats}; expected one of {', '.join(MODES)}")
        if self.max_tags is not None and self.stats is None:
            raise RefusedError("--softprune-max-tags is for statistics; expected --softprune-stats router with it")
        if self.max_tags is not None and not 1 <= self.max_tags <= MAX_TAGS:
            raise RefusedError(f"--softprune-max-tags: found {self.max_tags}; expected from 1 to {MAX_TAGS}")

    @property
    def mask_source(self) -> str:
        """The file that says which mask to start with; "no mask" if there is none."""
        if self.expert_mask_state is not None and Path(self.expert_mask_state).exists():
            return self.expert_mask_state
        return "no mask" if self.expert_mask is None else self.expert_mask

    def _start(self) -> MaskState:
        """The mask to start with, and the top_k that was in force with it if a state file says so."""
        source = self.mask_source
        if source == self.expert_mask_state:
            return read_state(source)
        return MaskState(None if self.expert_mask is None else mask_file.load(self.expert_mask), None)

    def _top_k(self, mask: ExpertMask | None, kept: int | None, spec: ModelSpec) -> int:
        flag, asked = self.expert_top_k, mask.top_k if mask else None
        if isinstance(asked, list):
            if len(set(asked)) > 1:
                raise MaskError(self.mask_source, "top_k", "a different number for each layer", "one number: this engine has one top_k")
            asked = asked[0]
        if flag is not None and not 1 <= flag <= spec.top_k:
            raise RefusedError(f"--expert-top-k: found {flag}; expected from 1 to the model's own top_k = {spec.top_k}")
        if flag is not None and asked is not None and flag != asked:
            raise RefusedError(f"--expert-top-k: found {flag}; expected {asked}, as the mask {self.mask_source} says, or no flag")
        if kept is not None and kept > spec.top_k:
            raise MaskError(self.mask_source, "top_k", str(kept), f"at most the model's own top_k = {spec.top_k}")
        return flag or asked or kept or spec.top_k


class Launch(LaunchRequest):
    """A request that has been checked in the front end, as it travels to the worker processes.

    Attributes:
        mask_hash: hash of the mask that was checked, or None.
        top_k: experts per token that the engine is to run with.
        model_top_k: the model's own.
    """

    mask_hash: str | None
    top_k: int
    model_top_k: int

    def spec(self, hf_config: Any) -> ModelSpec:
        """The model's shape as an engine was configured, with the model's own top_k.

        Args:
            hf_config: the engine's Transformers config, in which top_k may be overridden.

        Raises:
            CheckpointError: the architecture is not known.
        """
        # Attributes, not to_dict(): Transformers renames fields of config.json and maps the old names.
        config = {field: getattr(hf_config, field, None) for field in SPEC_FIELDS}
        return spec_of({**config, "num_experts_per_tok": self.model_top_k}, "model config")

    def with_top_k(self, overrides: Mapping[str, Any], name: str) -> dict[str, Any]:
        """An engine's config overrides with this top_k in them, so that its kernels and graphs are built for it.

        Args:
            overrides: the user's own.
            name: what the engine calls them.

        Raises:
            RefusedError: they ask for another one.
        """
        result = dict(overrides)
        if self.top_k == self.model_top_k and not set(TOP_K_FIELDS) & set(result):
            return result
        for field in TOP_K_FIELDS:
            if result.get(field, self.top_k) != self.top_k:
                raise RefusedError(f"{name}.{field}: found {result[field]}; expected {self.top_k}, as --expert-top-k or the mask says")
            result[field] = self.top_k
        return result

    def read_mask(self, spec: ModelSpec) -> ExpertMask | None:
        """Read the mask file again, in a worker.

        Raises:
            MaskError: the file is gone, broken, for another model, or not the one that was checked.
        """
        (mask, _), source = self._start(), self.mask_source
        if (mask.hash if mask else None) != self.mask_hash:
            found = mask.hash if mask else "no mask"
            raise MaskError(source, "", f"another mask ({found[:19]}…) than at the start", f"{str(self.mask_hash)[:19]}…, unchanged")
        if mask is not None:
            mask.check_model(spec, source)
        return mask


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
