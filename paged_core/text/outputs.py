"""What users get: finished generations, and deltas of running ones. These are data only, under vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from paged_core.scheduling.request import Logprob

TokenLogprobs = Mapping[int, Logprob]
"""For one position: token id -> its Logprob. The chosen token comes first."""


@dataclass(frozen=True)
class CompletionOutput:
    """One of the ``n`` sequences generated for a prompt."""

    index: int  # which of the n
    text: str  # without the stop string, unless it was asked for
    token_ids: Sequence[int]  # all that were sampled, the stop token or those of the stop string included
    logprobs: Sequence[TokenLogprobs] | None = None  # one for each token, if asked for
    cumulative_logprob: float | None = None  # sum over token_ids, if logprobs were asked for
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while it runs
    stop_reason: str | int | None = None  # the stop string or the stop token id that ended it; None for EOS


@dataclass(frozen=True)
class RequestMetrics:
    """The times of a request, in ``time.perf_counter()`` seconds."""

    arrival: float
    first_token: float | None = None
    finish: float | None = None
    num_cached_tokens: int = 0  # prompt tokens whose K/V were found in the prefix cache

    @property
    def time_to_first_token_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival


@dataclass(frozen=True)
class GenerationOutput:
    """The result of one prompt."""

    request_id: str  # unique in its engine
    prompt: str | None  # None when the prompt was given as token ids
    prompt_token_ids: Sequence[int]  # as the model saw them
    outputs: Sequence[CompletionOutput]  # n of them, by index
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None  # [len(prompt_token_ids)], first None
    finished: bool = True  # all of outputs have ended
    error: str | None = None  # why an output's finish_reason is "error"
    metrics: RequestMetrics | None = None  # when it arrived, began and ended


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """What was added to one of the sequences since its last delta. It may cover several steps."""

    request_id: str  # of the Stream that it came from
    index: int  # which of the n sequences
    text: str  # joined over all deltas: CompletionOutput.text
    token_ids: Sequence[int] = ()  # the new ones; their text may come with a later delta
    logprobs: Sequence[TokenLogprobs] | None = None  # one for each of token_ids, if asked for
    finish_reason: str | None = None  # set on the last delta of this index
    stop_reason: str | int | None = None  # as CompletionOutput's
    error: str | None = None  # why finish_reason is "error"
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None  # with the first delta

    def parts(self) -> list[StreamDelta]:
        """Return the delta itself. If it ends in "abort" or "error" and has text, return the text and the end as two
        deltas, because callers that raise an error for such an end must not lose the text."""
        if self.finish_reason not in ("abort", "error") or not (self.text or self.token_ids):
            return [self]
        end = StreamDelta(self.request_id, self.index, "", finish_reason=self.finish_reason, error=self.error)
        return [replace(self, finish_reason=None, error=None), end]


def join_deltas(deltas: Sequence[StreamDelta]) -> StreamDelta:
    """Join successive deltas of one index into one."""
    first, last = deltas[0], deltas[-1]
    if first is last:
        return first
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return StreamDelta(
        request_id=first.request_id,
        index=first.index,
        text="".join([delta.text for delta in deltas]),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        logprobs=logprobs or last.logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
        prompt_logprobs=first.prompt_logprobs,
    )


def refused(request_id: str, prompt: object, num_outputs: int, error: str, arrival: float) -> GenerationOutput:
    """Return the output of a prompt that never became a request."""
    return GenerationOutput(
        request_id,
        prompt if isinstance(prompt, str) else None,
        (),
        [CompletionOutput(index, "", (), finish_reason="error") for index in range(num_outputs)],
        error=error,
        metrics=RequestMetrics(arrival, finish=arrival),
    )
