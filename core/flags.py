"""softprune's command line flags, the same for every engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag that asks for something.

    Attributes:
        option: as typed.
        field: the field of `LaunchRequest` that it sets.
        help: for `--help`.
        value: metavar and type of its value, or None for a switch.
    """

    option: str
    field: str
    help: str
    value: tuple[str, type] | None = None

    @property
    def dest(self) -> str:
        """Attribute of the parsed arguments."""
        return self.option.removeprefix("--").replace("-", "_")


FLAGS = (
    Flag("--expert-mask", "expert_mask", "Expert mask (softprune mask new): pruned experts are never routed to.", ("FILE", str)),
    Flag("--expert-top-k", "expert_top_k", "Experts per token, from 1 to the model's own number.", ("K", int)),
    Flag("--expert-mask-force", "expert_mask_force", "Use a mask whose fingerprint is that of other weights. Lifts no other check."),
    Flag(
        "--expert-mask-state", "expert_mask_state",
        "File that keeps the mask that was put live across restarts; where it exists, it decides and not --expert-mask.", ("FILE", str),
    ),
    Flag("--softprune-control", "control", "Serve softprune's control API, so that masks can be put live; the other flags imply it."),
    Flag("--softprune-debug-routes", "debug_routes", "Count what every router selects (GET /softprune/v1/routes); eager mode only."),
    Flag(
        "--softprune-stats", "stats",
        "Make room for statistics, which the control API then starts and stops: router, reap (and experts' output norms) or eaft (and how "
        "sure the model is of its tokens).", ("MODE", str),
    ),
    Flag("--softprune-max-tags", "max_tags", "Tags, default among them, that statistics are kept apart by (8).", ("N", int)),
)  # fmt: skip
KEY_OPTION = "--softprune-key"
KEY_HELP = "Key of the control API; else SOFTPRUNE_KEY, else one is generated and its file logged."
GROUP = ("softprune", "Prune experts while serving.")


def asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a user set; 0 is one that was set."""
    return {field: value for field, value in given.items() if value is not None and value is not False}


def asked_in(args: Any) -> dict[str, Any]:
    """What parsed arguments ask for, by field of `LaunchRequest`."""
    return asked({flag.field: getattr(args, flag.dest, None) for flag in FLAGS})
