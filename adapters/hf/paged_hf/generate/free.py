"""Plain greedy calls: each row runs on its own in the engine's batch, and ends independently of the others.

This file knows greedy search and nothing else: what needs processors, criteria or scores is lockstep.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from paged_core import Engine, FinishReason, Greedy, Request, RequestError, RequestOutput, SamplingParams
from paged_hf.generate.calls import EngineCall, NotStarted, check_length, check_tokens
from paged_hf.generate.host import EngineHost

# Stock's choice of tokens. The engine's own sampler would apply plugins, which stock's users haven't asked for. One for
# all calls, so that their rows are selected together.
_GREEDY = Greedy()


class FreeCall(EngineCall):
    """Greedy continuations of some prompts, at most ``max_tokens`` each, up to one of ``eos``."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, eos: Sequence[int], *, padded: bool, streams: bool
    ) -> None:
        super().__init__(padded)
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._eos = eos
        self._streams = streams
        self._num_left = len(prompts)
        self.outputs: list[list[int]] = []  # read by the caller once ``wait`` has returned None

    def enter(self, engine: Engine, name: str) -> list[Request]:
        check_length(engine, self._prompts, self._max_tokens)
        check_tokens(engine, self._prompts)
        known = tuple(token for token in self._eos if 0 <= token < engine.spec.vocab_size)  # others never come
        params = SamplingParams(temperature=0, max_tokens=self._max_tokens, stop_token_ids=known, ignore_eos=True)
        rows: list[Request] = []
        try:
            for i, prompt in enumerate(self._prompts):
                rows += engine.add_request(f"{name}.{i}", prompt, params, selector=_GREEDY)
        except BaseException:
            for row in rows:
                engine.stop(row)
            raise
        return rows

    def take(self, output: RequestOutput) -> None:
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.tell(RequestError(output.request.id, output.error or "it was aborted"))
            return
        if self._streams:
            self.tell(list(output.token_ids))
        if output.finish_reason is not None:
            self._num_left -= 1
            if self._num_left == 0:
                self.outputs = [row.output_token_ids for row in self.rows]
                self.tell(None)


def generate(
    host: EngineHost,
    input_ids: Tensor,  # i64 [B,L], padded
    prompts: Sequence[Sequence[int]],  # the same without padding
    max_tokens: int,
    eos: Sequence[int],
    pad: int,
    streamer: Any | None,
) -> Tensor:
    """``[B, L + longest output]``: greedy continuations, padded behind their ends as stock pads them.

    Raises:
        NotStarted: the engine could not run the rows, and nothing was streamed.
    """
    padded = any(len(prompt) < input_ids.shape[1] for prompt in prompts)
    call = FreeCall(prompts, max_tokens, eos, padded=padded, streams=streamer is not None)
    try:
        host.open(call)
        for token in _tokens(call):
            streamer.put(_on_cpu([token]))  # type: ignore[union-attr]  # without one there are none
    finally:
        host.close(call)
    if streamer is not None:
        streamer.end()
    width = input_ids.shape[1] + max(map(len, call.outputs))
    dtype = torch.promote_types(input_ids.dtype, torch.int64)
    sequences = torch.full((len(prompts), width), pad, dtype=dtype, device="cpu")
    for row, tokens in enumerate(call.outputs):
        sequences[row, input_ids.shape[1] : input_ids.shape[1] + len(tokens)] = _on_cpu(tokens)
    sequences = sequences.to(input_ids.device)
    sequences[:, : input_ids.shape[1]] = input_ids
    return sequences


def _tokens(call: FreeCall) -> Iterator[int]:
    """The tokens of a streaming call as they are generated; ends with the call."""
    streamed = False
    while True:
        try:
            tokens = call.wait()
        except NotStarted:
            raise
        except Exception as error:
            if streamed:
                raise
            raise NotStarted from error
        if tokens is None:
            return
        streamed = True
        yield from tokens


def _on_cpu(tokens: list[int]) -> Tensor:
    return torch.tensor(tokens, device="cpu")  # whatever the caller's default device
