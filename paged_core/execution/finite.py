"""Whether what a step has computed for its requests is made of numbers. Where it isn't, nobody else may find its K/V.

What goes wrong in a token's hidden states or K/V shows as NaN in its own logits, and in those of every later token that
attends to it. So a chunk's last row of logits speaks for the whole chunk: one pass over a row, where rows are there
anyway, in place of one over all K/V.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from paged_core.execution.staging import Download, take_rows
from paged_core.scheduling.request import Request


class FiniteCheck:
    """A look at some rows of ``logits [N, vocab]``, row ``rows[i]`` for ``requests[i]``; nobody waits for it."""

    def __init__(self, logits: Tensor, rows: Sequence[int], requests: Sequence[Request]) -> None:
        self._requests = requests
        # A model may forbid tokens with -inf; NaN wins over everything in amax.
        self._finite = Download(take_rows(logits, rows).amax(-1).isfinite()) if rows else None

    def failed(self) -> Collection[Request]:
        """Wait for it: the requests that have a row which is NaN, or +inf, or -inf throughout."""
        if self._finite is None:
            return ()
        return [request for request, finite in zip(self._requests, self._finite.wait(), strict=True) if not finite]
