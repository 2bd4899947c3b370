"""The interface of every call to the server that carries it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from paged_core import GenerationOutput, Prompt, SamplingParams, StreamDelta

if TYPE_CHECKING:
    from paged_serving.grammars.grammars import Grammar


class Call(Protocol):
    """One HTTP call without the HTTP. Its owner submits each of ``prompts`` with ``params``. If ``stream``, it sends
    ``first_chunks``, ``chunks`` for each delta, and ``last_chunks``; else ``answer``. Deltas and results that ended in
    "abort" or "error" are not for the call: their owner answers with an error.
    """

    prompts: list[Prompt]
    params: SamplingParams
    grammar: Grammar | None  # that ``params`` bring: its ``compile`` comes first, in a thread that may be kept
    stream: bool
    retells: bool  # its first and last chunks repeat the body or the whole answer, so they may be large

    @property
    def named(self) -> Mapping[str, str]:
        """What the protocol calls "prompt" and fields of SamplingParams, where that differs."""
        ...

    def first_chunks(self) -> list[dict[str, Any]]:
        """What is sent before all deltas."""
        ...

    def chunks(self, number: int, delta: StreamDelta) -> list[dict[str, Any]]:
        """What is sent for a delta of prompt ``number``."""
        ...

    def last_chunks(self, results: Sequence[GenerationOutput]) -> list[dict[str, Any]]:
        """What is sent when all prompts have ended; one result per prompt."""
        ...

    def answer(self, results: Sequence[GenerationOutput]) -> Any:
        """The body of a call that isn't streamed; one result a prompt."""
        ...
