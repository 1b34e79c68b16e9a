"""Whether a checkpoint can say what a mask says: one number of experts, and one of experts per token, for all layers."""

from __future__ import annotations

from softprune.checkpoint.families import Family
from softprune.errors import MaskError
from softprune.mask import ExpertMask


def kept_number(mask: ExpertMask, mask_file: str, family: Family, pad_to: int | None) -> int:
    """Experts in each layer of the rewritten checkpoint.

    Args:
        mask, mask_file: the mask, and its name for errors.
        family: of the model.
        pad_to: fill up to so many, or None.

    Raises:
        MaskError: layers keep different numbers and are not to be filled up, or cannot be.
    """
    low, high, most = min(mask.num_kept), max(mask.num_kept), mask.model.num_experts
    if pad_to is None:
        if low == high:
            return high
        offer = f"; --pad-to {high} fills the others up with experts that no token can reach" if family.router_bias else ""
        one = f"one number for all layers, as config.json has for {family.num_experts_key}"
        raise MaskError(mask_file, "keep", f"{low} to {high} experts kept", one + offer)
    if family.router_bias is None:
        raise MaskError(
            "--pad-to", "", str(pad_to), f"none for {family.name}: its routers have no bias that could keep tokens from the added experts"
        )
    if not high <= pad_to <= most:
        raise MaskError("--pad-to", "", str(pad_to), f"from {high}, the most that {mask_file} keeps in a layer, to the model's {most}")
    return pad_to


def mask_top_k(mask: ExpertMask, mask_file: str) -> int:
    """Experts per token of the rewritten checkpoint.

    Raises:
        MaskError: layers have different ones.
    """
    top_k = {mask.layer_top_k(layer) for layer in range(mask.model.num_layers)}
    if len(top_k) > 1:
        raise MaskError(
            mask_file, "top_k", f"{min(top_k)} to {max(top_k)}", "the same in each layer: config.json has one num_experts_per_tok"
        )
    return top_k.pop()
