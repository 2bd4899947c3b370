"""Stock's generate() with our decoding loops in it.

Stock merges, validates and prepares everything, then calls ``type(self)._sample`` (or ``_beam_search``, ...). Here
``self`` is the user's model under a class of ours, whose loops pass the prepared call to a LoopHandler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from paged_hf import upstream
from paged_hf.generate import twins
from paged_hf.generate.prepared import Prepared


class LoopHandler(Protocol):
    """Answers the calls of stock's decoding loops."""

    model: Any  # whose calls they are

    def answer(self, call: Prepared) -> Any:
        """What the loop returns."""


def twin(model: Any, handler: LoopHandler) -> Any:
    """The model with decoding loops of ours."""
    kind: type = type(model)
    return twins.twin(model, _loops_of(kind), handler)


def custom_loop(custom: Callable[..., Any], handler: LoopHandler) -> Callable[..., Any]:
    """The caller's own decoding loop, given K/V in blocks."""
    return _instead_of("custom_generate", custom, handler)


@functools.cache
def _loops_of(kind: type) -> type:
    own: dict[str, Any] = {
        name: _instead_of(name, getattr(kind, name)) for name in upstream.LOOPS if hasattr(kind, name)
    }
    return twins.subclass(kind, own | {"forward": twins.ToldForward(kind)})


def _instead_of(name: str, stock: Callable[..., Any], always: LoopHandler | None = None) -> Callable[..., Any]:
    @functools.wraps(stock)  # generate() looks at a loop's signature
    def loop(
        self: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **rest: Any,
    ) -> Any:
        handler: LoopHandler = always or self._paged_part
        return handler.answer(
            Prepared(
                model=handler.model,
                name=name,
                loop=stock,
                input_ids=input_ids,
                processors=logits_processor,
                criteria=stopping_criteria,
                config=generation_config,
                rest=rest,
            )
        )

    return loop
