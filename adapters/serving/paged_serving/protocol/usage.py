"""The common part of the answers of OpenAI's two routes: usage, and the best of several samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paged_core import CompletionOutput, GenerationOutput, Prompt


class Usage:
    """Tokens of one call."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
        self._num_completion = 0

    def add(self, num_tokens: int) -> None:
        self._num_completion += num_tokens

    def count_all(self, results: Sequence[GenerationOutput]) -> None:
        """Count all samples, including those that best_of discards."""
        self._num_completion = sum(len(output.token_ids) for result in results for output in result.outputs)

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_completion,
            "total_tokens": self._num_prompt + self._num_completion,
        }

    def at_end(self, results: Sequence[GenerationOutput]) -> dict[str, Any]:
        cached = sum(result.metrics.num_cached_tokens for result in results if result.metrics is not None)
        return {**self.body(), "prompt_tokens_details": {"cached_tokens": cached}}


def best(outputs: Sequence[CompletionOutput], num: int, *, in_order: bool = False) -> Sequence[CompletionOutput]:
    """The ``num`` samples whose tokens have the highest mean log-probability, best first; all, as they are.
    ``in_order``: they are ordered already, as beams are."""
    if in_order or num >= len(outputs):
        return outputs[:num]
    return sorted(outputs, key=mean_logprob, reverse=True)[:num]


def mean_logprob(output: CompletionOutput) -> float:
    return (output.cumulative_logprob or 0.0) / max(1, len(output.token_ids))
