"""A tokenizer that raises in a server's thread, whatever it raises, costs the request it was asked for."""

from __future__ import annotations

import asyncio

import pytest

from bad_request import MyOwn
from paged_serving import ProtocolError, as_outcome


@pytest.mark.parametrize(
    "kind", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, StopIteration, MyOwn]
)
def test_an_event_loop_survives_whatever_its_threads_raise(kind: type[BaseException]) -> None:
    def read() -> None:
        raise kind("from a tokenizer")

    async def main() -> str:
        with pytest.raises(RuntimeError, match=f"serving the request raised {kind.__name__}"):
            await asyncio.wait_for(asyncio.to_thread(as_outcome, read), 30)
        return await asyncio.to_thread(as_outcome, lambda: "the next one")

    assert asyncio.run(main()) == "the next one"


def test_what_says_itself_what_is_wrong_is_left_as_it_is() -> None:
    def read() -> None:
        raise ProtocolError("no prompt", "prompt")

    with pytest.raises(ProtocolError, match="no prompt"):
        as_outcome(read)
