"""The text of a row is the same whatever number of tokens an engine hands over at a time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from paged_core import (
    SamplingParams,
)
from paged_core.scheduling.request import FinishReason, Request, RequestOutput
from paged_core.text.codec import Prompt, TextCodec, prepare_params
from paged_core.text.generation import Generation
from paged_core.text.outputs import join_deltas
from toy_tokenizers import ByteTokenizer

CODEC = TextCodec(ByteTokenizer())


def feed(text: str, sizes: list[int], asked: SamplingParams) -> tuple[Generation, str]:
    """Hand over ``text``, so many bytes a RequestOutput; returns the generation and the streamed text."""
    generation = Generation("x", Prompt(None, [1]), prepare_params(CODEC, asked), CODEC, 0.0)
    request = Request("x", [1], asked)
    ids = CODEC.encode(text)
    deltas = []
    while ids and not generation.finished:
        size = sizes.pop() if sizes else 1
        part, ids = ids[:size], ids[size:]
        delta = generation.feed(RequestOutput(request, part, finish_reason=None if ids else FinishReason.LENGTH))
        assert delta is not None
        deltas.append(delta)
    return generation, join_deltas(deltas).text if deltas else ""


@settings(max_examples=200)
@given(
    text=st.text("ab é😀", min_size=1, max_size=30),
    stops=st.lists(st.text("ab é😀", min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 6)),
    include=st.booleans(),
)
def test_streamed_and_final_text_agree_and_do_not_depend_on_the_steps(
    text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    asked = SamplingParams(stop=stops, include_stop_str_in_output=include)
    one_by_one, _ = feed(text, [], asked)
    generation, streamed = feed(text, sizes, asked)
    row = generation.result().outputs[0]
    assert streamed == row.text
    assert row == one_by_one.result().outputs[0]
    if row.finish_reason == "stop":
        assert CODEC.decode(row.token_ids).endswith(str(row.stop_reason))
        assert not any(stop in row.text for stop in stops) or include
    else:
        assert row.text == text
