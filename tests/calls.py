"""Runs protocol calls without HTTP: what a server would send for a body."""

from __future__ import annotations

from typing import Any

from alphabet_model import AlphabetModel
from paged_core import AsyncEngine, EngineConfig
from paged_serving import (
    Call,
    ChatCall,
    CompletionCall,
    RequestLimits,
    ServedModel,
    TGICall,
    compile_grammar,
)
from toy_tokenizers import CharacterTokenizer


class Alphabet:
    """A served model that continues the alphabet: a body goes in, an answer or chunks come out."""

    def __init__(self, limits: RequestLimits | None = None, *, tokenizer: Any = None, **config: Any) -> None:
        settings = EngineConfig(num_blocks=256, attention_backend="reference", **config)
        self.engine = AsyncEngine(AlphabetModel(), tokenizer=tokenizer or CharacterTokenizer(), config=settings)
        self.served = ServedModel(self.engine, ["alphabet", "abc"], limits)

    def answer(self, call: Call) -> Any:
        assert not call.stream
        compile_grammar(call)
        streams = [self.engine.submit(prompt, call.params) for prompt in call.prompts]
        return call.answer([stream.result(30) for stream in streams])

    def chunks(self, call: Call) -> list[dict[str, Any]]:
        assert call.stream
        compile_grammar(call)
        streams = [self.engine.submit(prompt, call.params) for prompt in call.prompts]
        sent = call.first_chunks()
        for number, stream in enumerate(streams):
            for delta in stream:
                sent += call.chunks(number, delta)
        return sent + call.last_chunks([stream.result(30) for stream in streams])


def complete(alphabet: Alphabet, **fields: Any) -> CompletionCall:
    return CompletionCall({"prompt": "A", **fields}, alphabet.served, "1")


def chat(alphabet: Alphabet, **fields: Any) -> ChatCall:
    return ChatCall({"messages": [{"role": "user", "content": "Hi"}], **fields}, alphabet.served, "1")


def generate(alphabet: Alphabet, **parameters: Any) -> TGICall:
    return TGICall({"inputs": "A" * 50, "parameters": parameters}, alphabet.served)
