"""What a row gets when nothing runs beside it: the same engine, one request, memory for all of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from fuzz.asks import MOST_TOKENS, Ask
from fuzz.model import FuzzModel, Kind
from fuzz.parts import Parts
from paged_core import Engine, EngineConfig, FinishReason
from paged_core.sampling.beam_search import ranked

_MOST = 10_000  # most answers kept


class Answer(NamedTuple):
    """Everything that one row got."""

    token_ids: list[int]
    finish_reason: FinishReason
    error: str | None
    logprobs: list[Any]  # a mapping for each token, if the request asks for logprobs
    prompt_logprobs: list[Any] | None


class Collected:
    """What one row has got so far."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []
        self.prompt_logprobs: list[Any] | None = None

    def take(self, output) -> None:
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "prompt_logprobs told twice"
            self.prompt_logprobs = list(output.prompt_logprobs)

    def answer(self, output, beams: bool) -> Answer:
        if beams:
            self.token_ids = list(ranked(output)[0].token_ids)
        return Answer(self.token_ids, output.finish_reason, output.error, self.logprobs, self.prompt_logprobs)


class Alone:
    """Answers of requests that run alone, on one engine for each Kind of model. They are cached."""

    def __init__(self) -> None:
        self._engines: dict[Kind, tuple[FuzzModel, Engine]] = {}
        self._answers: dict[Any, list[Answer]] = {}

    def answers(self, kind: Kind, weights: int, ask: Ask, max_tokens: int) -> list[Answer]:
        """Return the answer of each row."""
        if ask.beams:
            return self._found(kind, weights, replace(ask, max_tokens=max_tokens))
        found = self._found(kind, weights, replace(ask, max_tokens=MOST_TOKENS))
        return [_cut(answer, max_tokens) for answer in found]

    def _found(self, kind: Kind, weights: int, ask: Ask) -> list[Answer]:
        ask = replace(ask, salt=None, priority=0)
        key = (kind, weights, ask)
        if key not in self._answers:
            if len(self._answers) == _MOST:
                self._answers.clear()
            self._answers[key] = self._run(kind, weights, ask)
        return self._answers[key]

    def model(self, kind: Kind, weights: int) -> FuzzModel:
        model = self._engine(kind)[0]
        model.use_weights(weights)
        return model

    def _engine(self, kind: Kind) -> tuple[FuzzModel, Engine]:
        if kind not in self._engines:
            model = FuzzModel(kind)
            config = EngineConfig(
                block_size=16, num_blocks=40, max_num_seqs=4, max_num_batched_tokens=256, enable_prefix_caching=False,
                kv_cache_dtype=kind.kv_dtype, attention_backend="exact", lookahead=False,
            )  # fmt: skip
            self._engines[kind] = (model, Engine(model, config, plugins=[Parts()]))
        return self._engines[kind]

    def _run(self, kind: Kind, weights: int, ask: Ask) -> list[Answer]:
        engine = self._engine(kind)[1]
        self.model(kind, weights)
        rows = engine.add_request("alone", ask.prompt, ask.params())
        collected = {row: Collected() for row in rows}
        answers: list[Any] = [None] * len(rows)
        while engine.has_work:
            for output in engine.step():
                collected[output.request].take(output)
                if output.finish_reason is not None:
                    answers[output.request.index] = collected[output.request].answer(output, ask.beams)
        return answers


def _cut(answer: Answer, max_tokens: int) -> Answer:
    """Return the answer that fewer tokens would have given."""
    if len(answer.token_ids) < max_tokens or (len(answer.token_ids) == max_tokens and answer.error is None):
        return answer
    return answer._replace(
        token_ids=answer.token_ids[:max_tokens],
        logprobs=answer.logprobs[:max_tokens],
        finish_reason=FinishReason.LENGTH,
        error=None,
    )
