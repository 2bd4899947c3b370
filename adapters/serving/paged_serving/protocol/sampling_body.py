"""The sampling fields that OpenAI's and Anthropic's protocols share, vLLM's additions included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import field

from paged_serving.protocol.bodies import (
    HUGE,
    Body,
    Defaults,
    DefaultsSource,
    Penalty,
    Share,
    Texts,
    Whole,
    between,
    wide,
)

SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
           "min_tokens", "seed")  # fmt: skip


class SamplingBody(Body, frozen=True, kw_only=True):
    """The sampling fields with the same names in all protocols, vLLM's additions included."""

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
    def defaults(cls, served: DefaultsSource, wished: Mapping[str, Any]) -> Defaults:
        """As the model's makers advise."""
        return {cls: served.defaults}
