"""A conversation as one request to the engine, and its one answer as blocks.

It is what /v1/responses and /v1/messages share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from msgspec import field

from paged_core import CompletionOutput, GenerationOutput, SamplingParams, StreamDelta
from paged_serving.conversation.blocks import BlockNews, Blocks
from paged_serving.conversation.turns import Conversation
from paged_serving.protocol.bodies import HUGE, Body, Defaults, Penalty, Served, Share, Texts, Whole, between, wide
from paged_serving.protocol.served import Names, ServedModel
from paged_serving.protocol.structured import Structure
from paged_serving.protocol.talk import Fields, to_talk

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from paged_core import Prompt
    from paged_serving.grammars.grammars import Grammar


class SamplingBody(Body, frozen=True, kw_only=True):
    """How tokens are drawn, by the names that all protocols have for it, vLLM's additions included."""

    model: str | None = None
    stream: bool = False
    temperature: Annotated[float, between(0, HUGE)] = 1.0
    top_k: Annotated[int, between(-1)] = 0
    top_p: Share = 1.0
    min_p: Share = 0.0
    repetition_penalty: Annotated[float, between(0, HUGE)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    min_tokens: Whole = 0
    seed: Annotated[int, wide(-(2**63), 2**64 - 1)] | None = None
    stop: Texts = field(default_factory=list)

    @classmethod
    def defaults(cls, served: Served, wished: Mapping[str, Any]) -> Defaults:
        """As the model's makers advise."""
        return {cls: served.defaults}


SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
           "min_tokens", "seed")  # fmt: skip


class Answering:
    """One prompt, and the answer to it as it comes.

    ``named``: what the protocol calls fields of SamplingParams, where that differs.

    Raises:
        ProtocolError: it asks for something that can't be had, or the chat template refuses it.
    """

    def __init__(
        self,
        conversation: Conversation,
        served: ServedModel,
        params: SamplingParams,
        structure: Structure | None,
        fields: Fields,
        named: Names,
    ) -> None:
        served.check_limits(params, named)
        talk = to_talk(conversation, served, fields, structure=structure)
        self.grammar: Grammar | None = talk.grammar or served.grammar(structure)
        prompt = served.finish_prompt(fields.turns, talk.prompt, None)
        names = {"prompt": fields.turns, **named}
        self.params = served.finish_params(talk.adapted(params), [prompt], self.grammar, copies=0, named=names)
        self.prompts: list[Prompt] = [prompt]
        self.blocks = Blocks()
        self._reader = talk.reader()

    def feed(self, news: StreamDelta | CompletionOutput) -> Iterator[BlockNews]:
        """What ``news`` means for the blocks."""
        return self.blocks.feed(self._reader.feed(news))

    def read_whole(self, results: Sequence[GenerationOutput]) -> None:
        """The blocks of an answer that wasn't streamed."""
        (result,) = results
        (output,) = result.outputs
        for _ in self.feed(output):
            pass


def num_cached(results: Sequence[GenerationOutput]) -> int:
    """Prompt tokens that were found in the prefix cache."""
    return sum(result.metrics.num_cached_tokens for result in results if result.metrics is not None)
