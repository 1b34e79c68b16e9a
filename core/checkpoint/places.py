"""Where in a model a tensor belongs: to one expert, to all experts of a layer, or to none."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from softprune.checkpoint.families import Family

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_OF_EXPERTS = re.compile(r"\.(experts|router|gate)\.")


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs.

    Attributes:
        layer: its decoder layer, or None.
        rows_are_experts: the first dimension counts a layer's experts (routers, and experts stored together).
        expert: the expert that alone owns it, or None.
    """

    layer: int | None
    rows_are_experts: bool = False
    expert: int | None = None

    @property
    def is_pruned(self) -> bool:
        """Whether pruning changes it."""
        return self.rows_are_experts or self.expert is not None


def place_of(family: Family, name: str) -> Place:
    """Where a tensor belongs, from its name."""
    for pattern in _patterns(family):
        match = pattern.fullmatch(name)
        if match:
            expert = match.groupdict().get("expert")
            return Place(int(match["layer"]), expert is None, None if expert is None else int(expert))
    layer = _LAYER.match(name)
    return Place(int(layer[1]) if layer else None)


def looks_like_experts(name: str) -> bool:
    """Whether a name speaks of experts or a router; if its `Place` does not, the family table lacks a row."""
    return _OF_EXPERTS.search(name) is not None


def tensors_of_layer(family: Family, layer: int, num_experts: int) -> list[str]:
    """Names of every router and expert tensor that one MoE layer has."""
    router = [name.format(layer=layer) for name in (family.router_weight, family.router_bias) if name]
    if not family.expert_index:
        return router + [name.format(layer=layer) for name in family.expert_tensors]
    return router + [name.format(layer=layer, expert=expert) for expert in range(num_experts) for name in family.expert_tensors]


def renumbered(family: Family, name: str, expert: int) -> str:
    """The name that one expert's tensor has once the expert is number `expert`."""
    pattern, template = next(
        (pattern, template) for pattern, template in zip(_patterns(family), _templates(family), strict=True) if pattern.fullmatch(name)
    )
    match = pattern.fullmatch(name)
    assert match is not None
    return template.format(layer=match["layer"], expert=expert)


def _templates(family: Family) -> tuple[str, ...]:
    return tuple(name for name in (family.router_weight, family.router_bias, *family.expert_tensors) if name)


@functools.cache
def _patterns(family: Family) -> tuple[re.Pattern[str], ...]:
    return tuple(
        re.compile(re.escape(name).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)"))
        for name in _templates(family)
    )
