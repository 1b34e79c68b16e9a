"""Experts' outputs as OpenAI's Triton kernels for MXFP4 leave them: each times its gate, before a token's are added up.

Both engines bring these kernels. The one that adds up is launched from Python in steps that are no captured graph; what it is given
then can be read, so that nothing has to be computed again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

_MODULE = "triton_kernels.matmul_ogs"
OfRows = Callable[[torch.Tensor], torch.Tensor]
"""int64 [n], rows of a step -> [n, top_k, at least hidden_size], in ascending order of experts."""


class GatedOutputs:
    """Reads outputs of the MoE layer that runs next."""

    def __init__(self) -> None:
        self._asked: tuple[torch.Tensor, Callable[[torch.Tensor], None]] | None = None

    def watch(self) -> bool:
        """See what the kernels are given from now on; False where there are none of these."""
        module = sys.modules.get(_MODULE)
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
        if asked is not None:
            rows, then = asked
            then(of_rows(rows))

    def _grouped(self, function: Any) -> Any:
        """As of triton_kernels 3.5: `x` [parts of the sum, 1, rows of all experts, width], `indx` [tokens, top_k]; None in other uses."""

        @functools.wraps(function)
        def reduce_grouped(x: torch.Tensor, indx: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
            if indx is not None:
                of_tokens = indx
                self._see(lambda rows: x[:, 0][:, of_tokens[rows].long()].sum(0))
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
