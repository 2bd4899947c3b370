"""Generation: turns the RequestOutputs of one prompt's rows into text. This file knows nothing of threads.

LLM and AsyncEngine both keep Generations, and decide when to step the engine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from paged_core.interrupts import interrupts_the_process
from paged_core.sampling.beam_search import ranked
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import FinishReason, Logprob, RequestOutput
from paged_core.text.codec import Prompt, TextCodec
from paged_core.text.detokenizer import Detokenizer
from paged_core.text.outputs import CompletionOutput, GenerationOutput, RequestMetrics, StreamDelta, TokenLogprobs
from paged_core.text.stop_strings import StopStringChecker, StopStrings, stop_strings

if TYPE_CHECKING:
    from paged_core.engine.engine import Engine


class _Piece(NamedTuple):
    """The text and tokens that one RequestOutput adds to a row."""

    text: str
    num_tokens: int  # of the RequestOutput; fewer than it has if a stop string ended the row before


class TextRow:
    """The text of one row, up to its stop string."""

    def __init__(self, index: int, detokenizer: Detokenizer, stops: StopStrings | None, params: SamplingParams) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._texts: list[str] = []
        self._detokenizer = detokenizer
        self._params = params
        self._checker = None
        if stops is not None:
            self._checker = StopStringChecker(stops, params.include_stop_str_in_output)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def feed(self, output: RequestOutput) -> _Piece:
        """Take in an output of this row. Afterwards ``finish_reason`` says whether the row goes on."""
        text, num_tokens = self._text_of_tokens(output)
        self.token_ids += output.token_ids[:num_tokens]
        for token, entry in zip(output.token_ids[:num_tokens], output.logprobs or (), strict=False):
            self.logprobs.append(entry)
            self.cumulative_logprob += _logprob_of(entry, token)
        if output.finish_reason is not None and self.finish_reason is None:
            text += self._end(output.finish_reason)
        self._texts.append(text)
        return _Piece(text, num_tokens)

    def _text_of_tokens(self, output: RequestOutput) -> tuple[str, int]:
        tokens = output.token_ids
        silent_last = self._ends_with_stop_token(output) and not self._params.include_stop_str_in_output
        spoken = tokens[:-1] if silent_last else tokens
        if self._checker is None:
            return self._detokenizer.push(spoken), len(tokens)
        texts = []
        for position, token in enumerate(spoken, start=1):
            text = self._detokenizer.push([token])
            if len(self.token_ids) + position > self._params.min_tokens:
                text = self._checker.push(text)
            texts.append(text)
            if self._checker.matched is not None:
                self._stop_at(self._checker.matched)
                return "".join(texts), position
        return "".join(texts), len(tokens)

    def _end(self, reason: FinishReason) -> str:
        """Return the text that was still held back. It may complete a stop string."""
        rest = self._detokenizer.flush()
        if self._checker is not None:
            rest = self._checker.push(rest)
            if self._checker.matched is not None:
                self._stop_at(self._checker.matched)
                return rest
            rest += self._checker.flush()
        self.finish_reason = reason.value
        last = self.token_ids[-1] if self.token_ids else None
        if reason is FinishReason.STOP and last in self._params.stop_token_ids:
            self.stop_reason = last
        return rest

    def _stop_at(self, string: str) -> None:
        self.finish_reason, self.stop_reason = FinishReason.STOP.value, string

    def _ends_with_stop_token(self, output: RequestOutput) -> bool:
        if output.finish_reason is not FinishReason.STOP or not output.token_ids:
            return False
        return output.token_ids[-1] in output.request.stop_token_ids

    def completion(self) -> CompletionOutput:
        wants_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.token_ids),
            logprobs=list(self.logprobs) if wants_logprobs else None,
            cumulative_logprob=self.cumulative_logprob if wants_logprobs or self._params.use_beam_search else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class Generation:
    """The ``params.n`` rows of one prompt, and their times."""

    def __init__(
        self, request_id: str, prompt: Prompt, params: SamplingParams, codec: TextCodec, arrival: float
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.error: str | None = None
        self._arrival = arrival
        self._first_token: float | None = None
        self._finish: float | None = None
        self._num_cached_tokens = 0
        self._prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
        stops = stop_strings(params.stop) if params.stop else None
        self._rows = [
            TextRow(index, codec.detokenizer(params.skip_special_tokens), stops, params) for index in range(params.n)
        ]
        self._num_open = params.n

    @property
    def finished(self) -> bool:
        return self._num_open == 0

    @property
    def num_output_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self._rows)

    def feed(self, output: RequestOutput) -> StreamDelta | None:
        """Return what ``output`` adds, or None if its row had ended already. A stop string ends a row that the engine
        still runs. Beams return nothing before their end, because until then any of them may be dropped."""
        row = self._rows[output.request.index]
        if row.finish_reason is not None:
            return None
        if self.params.use_beam_search:
            if output.finish_reason is None:
                self._note(output)
                return None
            output, row.cumulative_logprob = ranked(output)
        piece = row.feed(output)
        self._note(output)
        logprobs = output.logprobs[: piece.num_tokens] if output.logprobs is not None else None
        return self._delta(row, piece.text, output.token_ids[: piece.num_tokens], logprobs, output)

    def fail(self, error: str) -> list[StreamDelta]:
        """End every open row with an error, because its text could not be made."""
        return self._end_open_rows(FinishReason.ERROR, error)

    def abort(self) -> list[StreamDelta]:
        """End every open row as aborted, without waiting for the engine."""
        return self._end_open_rows(FinishReason.ABORT, None)

    def result(self) -> GenerationOutput:
        """Return all outputs so far."""
        return GenerationOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            outputs=[row.completion() for row in self._rows],
            prompt_logprobs=self._prompt_logprobs,
            finished=self.finished,
            error=self.error,
            metrics=RequestMetrics(self._arrival, self._first_token, self._finish, self._num_cached_tokens),
        )

    def _note(self, output: RequestOutput) -> None:
        if output.token_ids and self._first_token is None:
            self._first_token = time.perf_counter()
            self._num_cached_tokens = output.request.num_cached
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if output.error is not None and self.error is None:
            self.error = output.error

    def _end_open_rows(self, reason: FinishReason, error: str | None) -> list[StreamDelta]:
        self.error = self.error or error
        deltas = []
        for row in self._rows:
            if row.finish_reason is None:
                row.finish_reason = reason.value
                deltas.append(self._delta(row, "", (), None, None))
        return deltas

    def _delta(
        self,
        row: TextRow,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None,
        output: RequestOutput | None,
    ) -> StreamDelta:
        if row.finish_reason is not None:
            self._num_open -= 1
            if self.finished:
                self._finish = time.perf_counter()
        return StreamDelta(
            request_id=self.request_id,
            index=row.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=row.finish_reason,
            stop_reason=row.stop_reason,
            error=self.error if row.finish_reason == FinishReason.ERROR.value else None,
            prompt_logprobs=output.prompt_logprobs if output is not None else None,
        )


def deliver(engine: Engine, generation: Generation, output: RequestOutput) -> Sequence[StreamDelta]:
    """Return the deltas of ``output``, and stop rows in the engine whose text has ended.

    If this fails (for example in the tokenizer), the request ends with an error, and nothing is raised.
    """
    try:
        delta = generation.feed(output)
    except BaseException as error:
        if interrupts_the_process(error):
            raise
        engine.abort(generation.request_id)
        return generation.fail(f"its text could not be made: {error!r}")
    if delta is None:
        return ()
    if delta.finish_reason is not None and output.finish_reason is None:
        engine.stop(output.request)
    return (delta,)


def _logprob_of(entry: Mapping[int, Logprob], token: int) -> float:
    return entry[token].logprob if token in entry else 0.0
