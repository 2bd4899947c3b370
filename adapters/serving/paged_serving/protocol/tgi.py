"""TGI's generate routes: one body in, and what is to be sent for the engine's news.

As in TGI, stop strings stay in the text, sampling is on as soon as a parameter asks for it, and every streamed token
is a chunk of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paged_core import CompletionOutput, Detokenizer, GenerationOutput, Logprob, SamplingParams, StreamDelta
from paged_serving.protocol.fields import Fields, fields_of
from paged_serving.protocol.served import ServedModel, sampling_params
from paged_serving.protocol.structured import tgi_structure
from paged_serving.protocol.tokens import finite
from paged_serving.protocol.usage import best

_MAX_NEW_TOKENS = 100  # TGI's default
_NAMES = {
    "n": "parameters.best_of",
    "max_tokens": "parameters.max_new_tokens",
    "stop": "parameters.stop",
    "logprobs": "parameters.top_n_tokens",
    "prompt_logprobs": "parameters.decoder_input_details",
    "prompt": "inputs",
}


class TGICall:
    """One call under way; see protocol.call for its members.

    ``stream``: whether the route decides it; None: the body's ``stream`` does, and a plain answer is a list, as
    POST / has it.

    Raises:
        ProtocolError: the body asks for something that can't be had.
    """

    def __init__(self, body: Any, served: ServedModel, stream: bool | None = None) -> None:
        fields = fields_of(body)
        asked = fields.flag("stream")
        self.stream = asked if stream is None else stream
        inputs = fields.text("inputs")
        if inputs is None:
            raise fields.error("inputs", "is missing")
        fields.ignore("model")  # some clients name it; there is one
        inner = fields.inner("parameters")
        fields.finish()
        self._served = served
        self._listed = stream is None
        self._details = inner.flag("details")
        self._prefill = inner.flag("decoder_input_details")
        self._full_text = inner.flag("return_full_text")
        self._num_top = inner.integer("top_n_tokens", 0)
        truncate = inner.integer("truncate", low=1)
        self.params = self._params(inner)
        self.grammar = served.grammar(tgi_structure(inner))
        inner.finish()
        self._check(inner)
        self.prompts = [served.finish_prompt("inputs", served.encode(inputs), truncate)]
        copies = self.params.n if self._prefill or self._full_text else 0
        named = {**_NAMES, "echo": "parameters.return_full_text"}
        self.params = served.finish_params(self.params, self.prompts, self.grammar, copies=copies, named=named)
        self._detokenizer = served.codec.detokenizer(skip_special_tokens=True)
        self._texts: list[str] = []
        self._num_tokens = 0

    # ---- the way in ----------------------------------------------------------------------------------------------

    def _params(self, fields: Fields) -> SamplingParams:
        fields.only("watermark", [False], "can't be honoured: this server marks no text")
        fields.only("typical_p", [1, 1.0], "can't be honoured; use top_p")
        fields.only("adapter_id", [""], "can't be honoured: this server has no adapters")
        temperature, top_k, top_p = (
            fields.number("temperature", low=1e-6),
            fields.integer("top_k", 0),
            fields.number("top_p", 1.0, low=1e-12, high=1),
        )
        sampled = fields.flag("do_sample") or (temperature or 1.0) != 1.0 or top_k > 0 or top_p < 1
        seed = fields.integer("seed", high=2**64 - 1)
        if sampled and seed is None:
            seed = random.getrandbits(64)
        self._seed = seed if sampled else None
        best_of = fields.integer("best_of", 1, low=1)
        if best_of > 1 and not sampled:
            raise fields.error("best_of", "needs sampling; set do_sample")
        return sampling_params(
            n=best_of,
            temperature=(temperature or 1.0) if sampled else 0.0,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=fields.number("repetition_penalty", 1.0, low=1e-6),
            frequency_penalty=fields.number("frequency_penalty", 0.0, low=-2, high=2),
            seed=self._seed,
            max_tokens=fields.integer("max_new_tokens", self._served.default_max_tokens(_MAX_NEW_TOKENS), low=1),
            stop=fields.texts("stop"),
            include_stop_str_in_output=True,
            logprobs=self._num_top if self.stream or self._details or best_of > 1 else None,
            prompt_logprobs=0 if self._prefill else None,
        )

    def _check(self, fields: Fields) -> None:
        self._served.check_limits(self.params, _NAMES)
        if self.stream and self._prefill:
            raise fields.error("decoder_input_details", "can't be streamed")
        if self.stream and self.params.n > 1:
            raise fields.error("best_of", "above 1 can't be streamed: the best is known at the end")

    # ---- the way back --------------------------------------------------------------------------------------------

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
            if not chunks:  # an end without a token of its own: the form has no place for it but a token
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
        """Each token with its share of the text, and the likeliest that stood beside it. The shares make the text."""
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
