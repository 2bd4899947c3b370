"""TGI's generate routes: one body in, JSON or chunks out.

As in TGI, every streamed token is a chunk of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paged_core import CompletionOutput, Detokenizer, GenerationOutput, Logprob, StreamDelta
from paged_serving.protocol.reading import read_body
from paged_serving.protocol.served import ServedModel
from paged_serving.protocol.tgi_body import NAMES, TGIBody, to_call
from paged_serving.protocol.tokens import finite
from paged_serving.protocol.usage import best


class TGICall:
    """One call under way; see protocol.call for its members.

    ``stream``: whether the route decides it; None: the body's ``stream`` does, and a plain answer is a list, as
    POST / has it.

    Raises:
        ProtocolError: the body asks for something that can't be had.
    """

    def __init__(self, body: Any, served: ServedModel, stream: bool | None = None) -> None:
        wished = read_body(TGIBody, body, served)
        self.stream = wished.stream if stream is None else stream
        self.retells, self.named = True, NAMES
        prepared = to_call(wished, served, stream=self.stream)
        self.prompts, self.params, self.grammar = [prepared.prompt], prepared.params, prepared.grammar
        self._served, self._seed = served, prepared.seed
        self._listed = stream is None
        self._details, self._full_text = wished.parameters.details, wished.parameters.return_full_text
        self._num_top = wished.parameters.top_n_tokens
        self._detokenizer = served.codec.detokenizer(skip_special_tokens=True)
        self._texts: list[str] = []
        self._num_tokens = 0

    def first_chunks(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, number: int, delta: StreamDelta) -> list[dict[str, Any]]:
        self._texts.append(delta.text)
        chunks = []
        for token, top in self._tokens(delta, self._detokenizer):
            self._num_tokens += 1
            chunk: dict[str, Any] = {"index": self._num_tokens, "token": token}
            if self._num_top:
                chunk["top_tokens"] = top
            chunks.append({**chunk, "generated_text": None, "details": None})
        if delta.finish_reason is not None:
            if not chunks:  # an end without a new token: TGI's form can express it only with a token
                token = {"id": 0, "text": delta.text, "logprob": 0.0, "special": True}
                chunks.append({"index": self._num_tokens, "token": token})
            chunks[-1].update(self._stream_end(delta))
        return chunks

    def last_chunks(self, results: Sequence[GenerationOutput]) -> list[dict[str, Any]]:
        return []

    def answer(self, results: Sequence[GenerationOutput]) -> Any:
        (result,) = results
        outputs = result.outputs
        (output,) = best(outputs, 1)
        answer: dict[str, Any] = {"generated_text": self._full(output.text)}
        if self._details:
            prefill = self._prefill_of(result)
            answer["details"] = {**self._details_of(output), "prefill": prefill}
            if len(outputs) > 1:
                answer["details"]["best_of_sequences"] = [
                    {"generated_text": self._full(other.text), **self._details_of(other), "prefill": prefill}
                    for other in outputs
                    if other is not output
                ]
        return [answer] if self._listed else answer

    def _stream_end(self, delta: StreamDelta) -> dict[str, Any]:
        details = None
        if self._details:
            details = {
                "finish_reason": _finish_reason(delta),
                "generated_tokens": self._num_tokens,
                "input_length": len(self.prompts[0].token_ids),
                "seed": self._seed,
            }
        return {"generated_text": self._full("".join(self._texts)), "details": details}

    def _details_of(self, output: CompletionOutput) -> dict[str, Any]:
        tokens = list(self._tokens(output, self._served.codec.detokenizer(skip_special_tokens=True)))
        details: dict[str, Any] = {
            "finish_reason": _finish_reason(output),
            "generated_tokens": len(output.token_ids),
            "seed": self._seed,
            "tokens": [token for token, _ in tokens],
        }
        if self._num_top:
            details["top_tokens"] = [top for _, top in tokens]
        return details

    def _prefill_of(self, result: GenerationOutput) -> list[dict[str, Any]]:
        ids = result.prompt_token_ids
        return [
            {
                "id": token,
                "text": self._served.tokens[token],
                "logprob": finite(entry[token].logprob) if entry else None,
            }
            for token, entry in zip(ids, result.prompt_logprobs or (), strict=False)
        ]

    def _tokens(
        self, news: StreamDelta | CompletionOutput, detokenizer: Detokenizer
    ) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Each token with its part of the text and its top tokens. The parts make the text."""
        rest = news.text
        last = len(news.token_ids) - 1
        for place, (token, entry) in enumerate(zip(news.token_ids, news.logprobs or (), strict=True)):
            share = detokenizer.push([token])
            share = rest if place == last else rest[: len(share)]
            rest = rest[len(share) :]
            yield self._token(token, share, entry), self._top(entry)

    def _token(self, token: int, share: str, entry: Mapping[int, Logprob]) -> dict[str, Any]:
        special = token in self._served.tokens.special and not share
        text = self._served.tokens[token] if special else share
        return {"id": token, "text": text, "logprob": finite(entry[token].logprob), "special": special}

    def _top(self, entry: Mapping[int, Logprob]) -> list[dict[str, Any]]:
        ranked = sorted(entry.items(), key=lambda item: item[1].rank)[: self._num_top]
        texts, special = self._served.tokens, self._served.tokens.special
        return [
            {"id": token, "text": texts[token], "logprob": finite(found.logprob), "special": token in special}
            for token, found in ranked
        ]

    def _full(self, text: str) -> str:
        return (self.prompts[0].text or "") + text if self._full_text else text


def _finish_reason(end: StreamDelta | CompletionOutput) -> str:
    if end.finish_reason != "stop":
        return str(end.finish_reason)
    return "stop_sequence" if isinstance(end.stop_reason, str) else "eos_token"
