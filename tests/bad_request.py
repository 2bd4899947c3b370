"""One request called "bad" fails beside others, which must not be affected."""

from __future__ import annotations

from functools import partial
from typing import Any

from paged_core import (
    Engine,
    FinishReason,
)
from tiny_engine import greedy, tiny_engine
from tiny_model import TinyModel

make_engine = partial(tiny_engine, num_blocks=200, max_num_batched_tokens=None)


PROMPT = [8, 6, 7, 5, 3, 0, 9]


class MyOwn(BaseException):
    """An exception class that no code under test knows."""


def run(engine: Engine) -> dict[str, Any]:
    """Return the final output of each request's first row, by id."""
    ends: dict[str, Any] = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is not None:
                ends.setdefault(output.request.id, output)
        engine.check()
    assert engine.memory.num_blocks_used == 0
    return ends


def assert_only_bad_failed(engine: Engine, *words: str) -> None:
    """Assert that the request "bad" ends with an error that contains ``words``, and that a neighbour and a later
    request get the tokens that each gets alone."""
    engine.add_request("neighbour", [1, 2, 3], greedy(9))
    ends = run(engine)
    assert ends["bad"].finish_reason is FinishReason.ERROR
    for word in words:
        assert word in ends["bad"].error
    engine.add_request("later", [1, 2, 3], greedy(9))
    for end in (ends["neighbour"], run(engine)["later"]):
        assert end.request.output_token_ids == TinyModel().generate([1, 2, 3], 9)
