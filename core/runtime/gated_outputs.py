"""Experts' outputs as OpenAI's Triton kernels for MXFP4 leave them: each times its gate, before a token's are added up.

Both engines bring these kernels (triton_kernels 3.5 in vLLM, 3.6 in SGLang). The one that adds up is launched from Python in steps that are
no captured graph; what it is given then can be read, so that nothing has to be computed again.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

MODULE = "triton_kernels.matmul_ogs"
"""Of these kernels, once an engine has imported them."""
OfRows = Callable[[torch.Tensor], torch.Tensor]
"""int64 [n], rows of a step -> [n, top_k, at least hidden_size], in ascending order of experts."""


class GatedOutputs:
    """Reads outputs of the MoE layer that runs next.

    Args:
        log: told of what goes wrong in reading, which must not end a step.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._asked: tuple[torch.Tensor, Callable[[torch.Tensor], None]] | None = None

    def watch(self) -> bool:
        """See what the kernels are given from now on; False where there are none of these."""
        module = sys.modules.get(MODULE)
        for name, seen in (("reduce_grouped", self._grouped), ("reduce", self._reduced)):
            if hasattr(module, name):
                setattr(module, name, seen(getattr(module, name)))
                return True
        return False

    def ask(self, rows: torch.Tensor, then: Callable[[torch.Tensor], None]) -> None:
        """Give these rows' outputs, as in `OfRows`, to `then`, once the next layer has them."""
        self._asked = rows, then

    def forget(self) -> None:
        """Nothing is asked for any more."""
        self._asked = None

    def _see(self, of_rows: OfRows) -> None:
        asked, self._asked = self._asked, None
        if asked is None:
            return
        rows, then = asked
        try:
            then(of_rows(rows))
        except Exception:  # noqa: BLE001 - the engine is in the middle of a step
            self._log.exception("softprune: the outputs of %d sampled tokens cannot be read", len(rows))

    def _grouped(self, function: Any) -> Any:
        """As of triton_kernels 3.5: `x` [parts of the sum, 1, rows of all experts, width], `indx` [tokens, top_k]; None in other uses."""

        @functools.wraps(function)
        def reduce_grouped(x: torch.Tensor, indx: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
            if indx is not None:
                of_tokens, parts = indx, x[:, 0]
                # Mostly there is one part, and it is not to be copied once more.
                self._see(lambda rows: functools.reduce(torch.add, (part[of_tokens[rows].long()] for part in parts)))
            return function(x, indx, *args, **kwargs)

        return reduce_grouped

    def _reduced(self, function: Any) -> Any:
        """As of triton_kernels 3.6: `x` [tokens, top_k, width], and `dim` 1; others in other uses."""

        @functools.wraps(function)
        def reduce(x: torch.Tensor, dim: int, *args: Any, **kwargs: Any) -> Any:
            if dim == 1:
                self._see(lambda rows: x[rows])
            return function(x, dim, *args, **kwargs)

        return reduce
