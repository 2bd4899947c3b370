"""The fields that OpenAI's two routes share, vLLM's additions included, and their combination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, field

from paged_core import SamplingParams
from paged_serving.protocol.bodies import (
    Body,
    Defaults,
    DefaultsSource,
    Ignored,
    Number,
    Positive,
    Texts,
    TokenIds,
    Whole,
    between,
    listed,
    must,
    only,
)
from paged_serving.protocol.others import OthersFields
from paged_serving.protocol.parsing import refuse
from paged_serving.protocol.sampling_body import SAMPLED
from paged_serving.protocol.served import Names, ServedModel, sampling_params
from paged_serving.protocol.structured import openai_structure

if TYPE_CHECKING:
    from paged_serving.grammars.grammars import Grammar

_MAX_SALT = 1024  # characters: it goes into the digest of every prompt
_LogitBias = Annotated[
    dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], Annotated[float, between(-100, 100)]],
    must("an object of token ids, each with a number from -100 to 100"),
]
_Salt = Annotated[
    str, Meta(min_length=1, max_length=_MAX_SALT), must(f"a string of 1 to {_MAX_SALT} characters that only you know")
]
_AS_THEY_ARE = (  # fields of SamplingParams by the same name
    *SAMPLED, "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "priority", "cache_salt",
    "use_beam_search", "length_penalty", "early_stopping",
)  # fmt: skip


class StreamOptions(Body, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Ignored = None  # padding


class OpenAIBody(OthersFields, frozen=True, kw_only=True):
    """The fields that both routes mean alike."""

    n: Positive = 1
    best_of: Positive | None = None
    stream_options: StreamOptions = field(default_factory=StreamOptions)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: Annotated[int, between(-1)] | None = None
    prompt_logprobs: Whole | None = None

    logit_bias: _LogitBias | None = None
    bad_words: Texts = field(default_factory=list)
    allowed_token_ids: TokenIds | None = None
    stop_token_ids: TokenIds = field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: Annotated[int, between(-(2**31))] = 0
    cache_salt: _Salt | None = None
    use_beam_search: bool = False
    length_penalty: Number = 1.0
    early_stopping: bool = False

    spaces_between_special_tokens: Annotated[
        Any, only(True, why="can't be false here: tokens are joined as the tokenizer does")
    ] = None
    store: Ignored = None  # no answer of these routes is stored
    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @classmethod
    def defaults(cls, served: DefaultsSource, wished: Mapping[str, Any]) -> Defaults:
        """The model's own defaults. Beam search samples nothing."""
        return {cls: {} if wished.get("use_beam_search") is True else served.defaults}


@dataclass(frozen=True)
class Options:
    """The options of a call besides its prompts."""

    model: str  # the name to answer under
    params: SamplingParams  # for the engine: n is best_of's, if that is more
    num_choices: int  # for each prompt
    stream: bool
    include_usage: bool
    usage_in_every_chunk: bool
    return_token_ids: bool
    grammar: Grammar | None
    named: Names


def to_options(
    body: OpenAIBody,
    served: ServedModel,
    *,
    max_tokens: int | None,
    num_top: int | None,
    prompt_logprobs: int | None,
    named: Names,
) -> Options:
    """What ``body`` asks for. The routes spell or mean what stands in the other arguments differently; ``named`` says
    how.

    Raises:
        ProtocolError: its fields don't go together, or ask for more than is served.
    """
    best_of = body.n if body.best_of is None else body.best_of
    structure = openai_structure(body)
    _check_together(body, best_of, served)
    if body.use_beam_search and structure is not None:
        refuse(structure.field, "can't go with use_beam_search; leave one of them out")
    model = served.check_name(body.model)
    by_logprobs = best_of > body.n and not body.use_beam_search  # so the best samples are found
    named = named if best_of == body.n else {"n": "best_of", **named}
    params = sampling_params(
        named,
        n=best_of,
        max_tokens=max_tokens,
        logprobs=num_top or 0 if by_logprobs else num_top,
        prompt_logprobs=prompt_logprobs,
        stop=listed(body.stop),
        bad_words=listed(body.bad_words),
        logit_bias=_logit_bias(body.logit_bias, served),
        allowed_token_ids=served.token_ids("allowed_token_ids", body.allowed_token_ids),
        stop_token_ids=served.token_ids("stop_token_ids", body.stop_token_ids) or (),
        **{name: getattr(body, name) for name in _AS_THEY_ARE},
    )
    served.check_limits(params, named)
    return Options(
        model=model,
        params=params,
        num_choices=body.n,
        stream=body.stream,
        include_usage=body.stream_options.include_usage,
        usage_in_every_chunk=body.stream_options.include_usage and body.stream_options.continuous_usage_stats,
        return_token_ids=body.return_token_ids,
        grammar=served.grammar(structure, ignore_eos=params.ignore_eos),
        named=named,
    )


def check_truncation(body: OpenAIBody) -> None:
    """vLLM's truncate_prompt_tokens: the prompt's last that many tokens; -1: as many as the model takes."""
    if body.truncate_prompt_tokens == 0:
        refuse("truncate_prompt_tokens", "is 0; give -1 or at least 1")


def _check_together(body: OpenAIBody, best_of: int, served: ServedModel) -> None:
    """Fields that say something about each other."""
    if best_of < body.n:
        refuse("best_of", f"is {best_of}; it must be at least n ({body.n})")
    if best_of > body.n and body.stream:
        refuse("best_of", "above n can't be streamed: which samples are best is known at the end")
    if body.use_beam_search and body.stream:
        refuse("stream", "can't go with use_beam_search: which beams are best is known at the end")
    options = body.stream_options
    if (options.include_usage or options.continuous_usage_stats) and not body.stream:
        refuse("stream_options", "needs stream to be true")
    if body.priority and not served.has_priorities:
        refuse("priority", 'needs a server whose scheduling policy is "priority"')


def _logit_bias(bias: Mapping[str, float] | None, served: ServedModel) -> dict[int, float] | None:
    if bias is None:
        return None
    if not all(token.isdigit() for token in bias):  # a pattern's end is also before a last line end
        refuse("logit_bias", "names a token that is no number")
    found = {int(token): value for token, value in bias.items()}
    if len(found) < len(bias):
        refuse("logit_bias", "names one token twice")
    served.check_ids("logit_bias", found)
    return found
