"""A conversation as one request to the engine, and its answer as blocks: the common part of /v1/responses and
/v1/messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from paged_core import CompletionOutput, GenerationOutput, SamplingParams, StreamDelta
from paged_serving.conversation.blocks import ContentBlocks, ContentNews
from paged_serving.conversation.turns import Conversation
from paged_serving.protocol.served import Names, ServedModel
from paged_serving.protocol.structured import Structure
from paged_serving.protocol.talk import Fields, to_talk

if TYPE_CHECKING:
    from paged_core import Prompt
    from paged_serving.grammars.grammars import Grammar


class ConversationAnswer:
    """One prompt, and the answer to it as it comes.

    ``named``: the protocol's names of SamplingParams' fields and of the prompt, where they differ.

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
        self.params = served.finish_params(talk.adapted(params), [prompt], self.grammar, copies=0, named=named)
        self.prompts: list[Prompt] = [prompt]
        self.blocks = ContentBlocks()
        self._reader = talk.reader()
        self._served = served

    def feed(self, news: StreamDelta | CompletionOutput) -> Iterator[ContentNews]:
        """The changes of the blocks by ``news``."""
        return self.blocks.feed(self._reader.feed(news))

    def read_whole(self, results: Sequence[GenerationOutput]) -> None:
        """The blocks of an answer that wasn't streamed."""
        (result,) = results
        (output,) = result.outputs
        for _ in self.feed(output):
            pass

    def num_reasoning_tokens(self) -> int:
        """The tokens of an ended answer's reasoning, tokenised by itself. Slow."""
        finish, blocks = self.blocks.finish, self.blocks.all
        reasoning = "".join(block.text for block in blocks if block.kind == "reasoning")
        if finish is None or not reasoning:
            return 0
        return min(len(self._served.encode(reasoning, add_special_tokens=False).token_ids), finish.num_tokens)


def num_cached(results: Sequence[GenerationOutput]) -> int:
    """Prompt tokens that were found in the prefix cache."""
    return sum(result.metrics.num_cached_tokens for result in results if result.metrics is not None)
