"""Short system messages, in the shape that Harmony gives them."""

from __future__ import annotations

import random

_PERSONAS = (
    "You are a helpful assistant.",
    "You are a careful assistant.",
    "You are ChatGPT, a large language model.",
    "You are a concise assistant.",
    "You are an assistant that follows instructions exactly.",
    "You answer questions.",
    "You are a patient tutor.",
    "You are a small language model.",
)
_EFFORTS = ("low", "medium", "high")
_CHANNELS = "# Valid channels: analysis, commentary, final."


def system_text(rng: random.Random) -> str:
    """A persona, sometimes with the reasoning effort and the list of channels."""
    lines = [rng.choice(_PERSONAS)]
    if rng.random() < 0.4:
        lines.append(f"Reasoning: {rng.choice(_EFFORTS)}")
    if rng.random() < 0.3:
        lines.append(_CHANNELS)
    return "\n".join(lines)
