"""The body of TGI's generate routes, and what it asks for.

As in TGI, stop strings stay in the text, and sampling is on as soon as a parameter asks for it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msgspec import field

from paged_core import Prompt, SamplingParams
from paged_serving.protocol.bodies import (
    HUGE,
    Body,
    Defaults,
    DefaultsSource,
    Ignored,
    Penalty,
    Positive,
    Texts,
    Whole,
    between,
    listed,
    only,
    wide,
)
from paged_serving.protocol.parsing import refuse
from paged_serving.protocol.served import ServedModel, sampling_params
from paged_serving.protocol.structured import TGIGrammar, tgi_structure

if TYPE_CHECKING:
    from paged_serving.grammars.grammars import Grammar

_MAX_NEW_TOKENS = 100  # TGI's default
NAMES = {
    "n": "parameters.best_of",
    "max_tokens": "parameters.max_new_tokens",
    "stop": "parameters.stop",
    "logprobs": "parameters.top_n_tokens",
    "prompt_logprobs": "parameters.decoder_input_details",
    "prompt": "inputs",
}


class TGIParameters(Body, frozen=True):
    """``parameters``: what each means is TGI's."""

    elsewhere: ClassVar[Mapping[str, str]] = {
        "max_tokens": "is OpenAI's; use parameters.max_new_tokens",
        "n": "is OpenAI's; use parameters.best_of",
        **dict.fromkeys(
            ("num_beams", "no_repeat_ngram_size", "min_new_tokens", "max_length", "min_length", "min_p",
             "penalty_alpha", "num_return_sequences", "bad_words_ids", "eos_token_id", "length_penalty",
             "presence_penalty"),
            "can't be honoured here: it is none of TGI's parameters",
        ),
    }  # fmt: skip

    max_new_tokens: Positive = _MAX_NEW_TOKENS
    do_sample: bool = False
    temperature: Annotated[float, between(1e-6, HUGE)] | None = None
    top_k: Whole = 0
    top_p: Annotated[float, between(1e-12, 1)] = 1.0
    seed: Annotated[int, wide(0, 2**64 - 1)] | None = None
    best_of: Positive = 1
    repetition_penalty: Annotated[float, between(1e-6, HUGE)] = 1.0
    frequency_penalty: Penalty = 0.0
    stop: Texts = field(default_factory=list)
    truncate: Positive | None = None
    return_full_text: bool = False
    details: bool = False
    decoder_input_details: bool = False
    top_n_tokens: Whole = 0
    grammar: TGIGrammar = field(default_factory=TGIGrammar)
    watermark: Annotated[Any, only(False, why="can't be honoured: this server marks no text")] = None
    typical_p: Annotated[Any, only(1, 1.0, why="can't be honoured; use top_p")] = None
    adapter_id: Annotated[Any, only("", why="can't be honoured: this server has no adapters")] = None


class TGIBody(Body, frozen=True):
    elsewhere: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(TGIParameters.__struct_fields__, "belongs into parameters"),
        "prompt": "is OpenAI's; use inputs, or POST /v1/completions",
        "messages": "is OpenAI's; use inputs, or POST /v1/chat/completions",
        "max_tokens": "is OpenAI's; use parameters.max_new_tokens",
    }
    inputs: str
    parameters: TGIParameters = field(default_factory=TGIParameters)
    stream: bool = False
    model: Ignored = None  # some clients name it; there is one

    @classmethod
    def defaults(cls, served: DefaultsSource, wished: Mapping[str, Any]) -> Defaults:
        return {TGIParameters: {"max_new_tokens": served.default_max_tokens(_MAX_NEW_TOKENS)}}


@dataclass(frozen=True)
class PreparedTGI:
    """What a body comes to."""

    prompt: Prompt
    params: SamplingParams  # as the engine gets them
    grammar: Grammar | None
    seed: int | None  # that is told; None: nothing was drawn


def to_call(body: TGIBody, served: ServedModel, *, stream: bool) -> PreparedTGI:
    """
    Raises:
        ProtocolError: ``body`` asks for something that can't be had.
    """
    wished = body.parameters
    seed = _seed(wished)
    params = _params(wished, seed, stream=stream)
    grammar = served.grammar(tgi_structure(wished.grammar))
    served.check_limits(params, NAMES)
    if stream and wished.decoder_input_details:
        refuse("parameters.decoder_input_details", "can't be streamed")
    if stream and params.n > 1:
        refuse("parameters.best_of", "above 1 can't be streamed: the best is known at the end")
    prompt = served.finish_prompt("inputs", served.encode(body.inputs), wished.truncate)
    copies = params.n if wished.decoder_input_details or wished.return_full_text else 0
    named = {**NAMES, "echo": "parameters.return_full_text"}
    return PreparedTGI(
        prompt, served.finish_params(params, [prompt], grammar, copies=copies, named=named), grammar, seed
    )


def _seed(wished: TGIParameters) -> int | None:
    """None: greedy. Sampling is on as soon as a field asks for it. The seed that is told is the one that is used."""
    has_temperature = wished.temperature not in (None, 1.0)
    if not (wished.do_sample or has_temperature or wished.top_k > 0 or wished.top_p < 1):
        return None
    return random.getrandbits(64) if wished.seed is None else wished.seed


def _params(wished: TGIParameters, seed: int | None, *, stream: bool) -> SamplingParams:
    if wished.best_of > 1 and seed is None:
        refuse("parameters.best_of", "needs sampling; set do_sample")
    tells_tokens = stream or wished.details or wished.best_of > 1
    return sampling_params(
        NAMES,
        n=wished.best_of,
        temperature=0.0 if seed is None else wished.temperature or 1.0,
        top_k=wished.top_k,
        top_p=wished.top_p,
        repetition_penalty=wished.repetition_penalty,
        frequency_penalty=wished.frequency_penalty,
        seed=seed,
        max_tokens=wished.max_new_tokens,
        stop=listed(wished.stop),
        include_stop_str_in_output=True,
        logprobs=wished.top_n_tokens if tells_tokens else None,
        prompt_logprobs=0 if wished.decoder_input_details else None,
    )
