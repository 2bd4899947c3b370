"""The fields that OpenAI's two routes share, vLLM's additions included: each honoured, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paged_core import SamplingParams
from paged_serving.protocol.fields import Fields, ProtocolError
from paged_serving.protocol.served import Names, ServedModel, sampling_params
from paged_serving.protocol.structured import openai_structure

if TYPE_CHECKING:
    from paged_serving.grammars.grammars import Grammar

_LABELS = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")

_MAX_SALT = 1024  # characters: it goes into the digest of every prompt
_BIAS = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}


@dataclass(frozen=True)
class Options:
    """What a call asks for beside its prompts."""

    model: str  # the name to answer under
    params: SamplingParams  # for the engine: n is best_of's, if that is more
    num_choices: int  # for each prompt
    stream: bool
    include_usage: bool
    usage_in_every_chunk: bool
    return_token_ids: bool
    grammar: Grammar | None
    named: Names


def read_options(
    fields: Fields,
    served: ServedModel,
    *,
    max_tokens: int | None,
    num_top: int | None,
    prompt_logprobs: int | None,
    named: Names,
) -> Options:
    """All fields that both routes have; they read those that they spell or mean differently themselves, and say what
    those are ``named``."""
    fields.ignore(*_LABELS)
    _refuse(fields)
    model = served.check_name(fields.text("model"))
    stream = fields.flag("stream")
    include_usage, every = _stream_options(fields, stream)
    n = fields.integer("n", 1, low=1)
    best_of = fields.integer("best_of", n, low=1)
    if best_of < n:
        raise fields.error("best_of", f"is {best_of}; it must be at least n ({n})")
    if best_of > n and stream:
        raise fields.error("best_of", "above n can't be streamed: which samples are best is known at the end")
    beams, structure = fields.flag("use_beam_search"), openai_structure(fields)
    if beams and stream:
        raise fields.error("stream", "can't go with use_beam_search: which beams are best is known at the end")
    if beams and structure is not None:
        raise fields.error(structure.field, "can't go with use_beam_search; leave one of them out")
    params = sampling_params(
        n=best_of,
        max_tokens=max_tokens,
        logprobs=num_top if best_of == n or beams else num_top or 0,  # the best samples are found by their logprobs
        prompt_logprobs=prompt_logprobs,
        use_beam_search=beams,
        **_sampling(fields, served, {} if beams else served.defaults),
    )
    named = named if best_of == n else {"n": "best_of", **named}
    served.check_limits(params, named)
    return Options(
        model=model,
        params=params,
        num_choices=n,
        stream=stream,
        include_usage=include_usage,
        usage_in_every_chunk=every,
        return_token_ids=fields.flag("return_token_ids"),
        grammar=served.grammar(structure, ignore_eos=params.ignore_eos),
        named=named,
    )


def truncation(fields: Fields) -> int | None:
    """vLLM's truncate_prompt_tokens: the prompt's last that many tokens; -1: as many as the model takes."""
    truncate: int | None = fields.integer("truncate_prompt_tokens", low=-1)
    if truncate == 0:
        raise fields.error("truncate_prompt_tokens", "is 0; give -1 or at least 1")
    return truncate


def _sampling(fields: Fields, served: ServedModel, defaults: Mapping[str, float]) -> dict[str, Any]:
    return {
        "temperature": fields.number("temperature", defaults.get("temperature", 1.0), low=0),
        "top_k": fields.integer("top_k", defaults.get("top_k", 0), low=-1),
        "top_p": fields.number("top_p", defaults.get("top_p", 1.0), low=0, high=1),
        "min_p": fields.number("min_p", defaults.get("min_p", 0.0), low=0, high=1),
        "repetition_penalty": fields.number("repetition_penalty", defaults.get("repetition_penalty", 1.0), low=0),
        "presence_penalty": fields.number("presence_penalty", 0.0, low=-2, high=2),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, low=-2, high=2),
        "seed": fields.integer("seed", low=-(2**63), high=2**64 - 1),
        "logit_bias": _logit_bias(fields, served),
        "bad_words": fields.texts("bad_words"),
        "allowed_token_ids": served.token_ids(fields, "allowed_token_ids"),
        "min_tokens": fields.integer("min_tokens", 0),
        "stop": fields.texts("stop"),
        "stop_token_ids": served.token_ids(fields, "stop_token_ids") or (),
        "include_stop_str_in_output": fields.flag("include_stop_str_in_output"),
        "ignore_eos": fields.flag("ignore_eos"),
        "skip_special_tokens": fields.flag("skip_special_tokens", True),
        "priority": _priority(fields, served),
        "cache_salt": _cache_salt(fields),
        "length_penalty": fields.number("length_penalty", 1.0),
        "early_stopping": fields.flag("early_stopping"),
    }


def _refuse(fields: Fields) -> None:
    """What can't be honoured; values that ask for nothing are taken."""
    fields.only("spaces_between_special_tokens", [True], "can't be false here: tokens are joined as the tokenizer does")
    fields.only("store", [False], "asks to store the answer; this server stores none")


def _stream_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    options = fields.inner("stream_options")
    include_usage = options.flag("include_usage")
    every = options.flag("continuous_usage_stats")
    options.only("include_obfuscation", [False], "can't be honoured: no padding is added to the stream")
    options.finish()
    if (include_usage or every) and not stream:
        raise fields.error("stream_options", "needs stream to be true")
    return include_usage, include_usage and every


def _logit_bias(fields: Fields, served: ServedModel) -> dict[int, float] | None:
    bias = fields.any("logit_bias", _BIAS)
    if bias is None:
        return None
    told = fields.error("logit_bias", "must be an object of token ids, each with a number from -100 to 100")
    if not isinstance(bias, dict):
        raise told
    found: dict[int, float] = {}
    for token, value in bias.items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise told
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
            raise told
        found[int(token)] = float(value)
    if len(found) < len(bias):
        raise fields.error("logit_bias", "names one token twice")
    served.check_ids("logit_bias", found)
    return found


def _priority(fields: Fields, served: ServedModel) -> int:
    priority: int = fields.integer("priority", 0, low=-(2**31))
    if priority and not served.has_priorities:
        raise ProtocolError('priority needs a server whose scheduling policy is "priority"', "priority")
    return priority


def _cache_salt(fields: Fields) -> str | None:
    salt = fields.text("cache_salt")
    if salt is not None and not 0 < len(salt) <= _MAX_SALT:
        told = f"has {len(salt)} characters; leave it out, or give 1 to {_MAX_SALT} that only you know"
        raise fields.error("cache_salt", told)
    return salt
