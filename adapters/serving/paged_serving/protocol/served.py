"""The served model as calls see it, and the limits of one call."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from paged_core import (
    ConfigError,
    InvalidRequestError,
    PluginError,
    Prompt,
    SamplingParams,
    TextCodec,
    encode_prompt,
    prepare_params,
)
from paged_serving.protocol.parsing import ProtocolError, in_words_of, shortened
from paged_serving.protocol.sizes import check_sizes
from paged_serving.protocol.structured import Structure
from paged_serving.protocol.template_options import taken_name
from paged_serving.protocol.tokens import TokenNumbers, TokenTexts
from paged_serving.response_templates.selection import given, of_model, that_reasons_as
from paged_serving.response_templates.template import ResponseTemplate

if TYPE_CHECKING:
    from paged_core import AsyncEngine
    from paged_serving.grammars.grammars import Grammar, Grammars

_MAX_TEXT = 16_384  # characters of a request's stop strings together: each takes memory of its own
Names = Mapping[str, str]  # a field of SamplingParams -> what the protocol at hand calls it, where that differs
_ANY_MODEL = ("tgi", "dummy")  # what TGI's clients call it where they weren't told a name


@dataclass(frozen=True)
class RequestLimits:
    """The limits of one HTTP request. None: the limit of the model and the cache."""

    max_prompt_tokens: int | None = None
    max_tokens: int | None = None  # of each sequence
    max_n: int = 128  # sequences of one prompt, best_of included
    max_prompts: int = 256  # in one request
    max_stop: int = 16  # stop strings and bad words
    max_logprobs: int = 20
    max_grammar_ms: int = 500  # of processor time, to compile what an answer must follow
    max_values: int = 3_000_000  # log-probabilities, or token ids, that its fields may come to together


class ServedModel:
    """A model under the names it is served by. Knows its text side; runs nothing.

    Args:
        model_defaults: absent sampling fields have the defaults of the model's generation_config.json.
        response_template: reads its answers: a file, or the name of one of ours; "none": none; None: the tokenizer's
            own, or one of ours that fits its chat template.
        template_options: variables of the chat template, for requests that don't set them.
        reasoning: whether reasoning is separated from text; None: if the chat template knows of reasoning.
        strict_fields: a field that nobody knows is refused; else it is left out.

    Raises:
        ConfigError: the response template or the template options can't be used.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        names: Sequence[str],
        limits: RequestLimits | None = None,
        *,
        model_defaults: bool = True,
        response_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        reasoning: bool | None = None,
        strict_fields: bool = True,
    ) -> None:
        spec = engine.engine.spec
        self.names = tuple(names)
        self.limits = limits or RequestLimits()
        self.strict_fields = strict_fields
        self.codec: TextCodec = engine.codec
        self.tokens = TokenTexts(engine.codec)
        self.token_numbers = TokenNumbers(engine.codec)
        self.max_model_len = engine.sizes.max_model_len
        self.defaults: Mapping[str, float] = spec.sampling_defaults if model_defaults else {}
        self.max_prompt_tokens = _max_prompt_tokens(engine, self.limits)
        self._vocab_size = spec.vocab_size
        of_tokenizer = (token for token in self.codec.eos_token_ids if token < spec.vocab_size)
        self._eos_token_ids = tuple(dict.fromkeys((*spec.eos_token_ids, *of_tokenizer)))
        self.template_options: Mapping[str, Any] = _template_options(template_options or {})
        self.response_template = _response_template(self.codec, response_template, reasoning)
        self.has_priorities = engine.config.scheduling_policy == "priority"

    def check_name(self, asked: str | None) -> str:
        """The name to answer under.

        Raises:
            ProtocolError: there is no model of that name here.
        """
        if asked is None or asked in _ANY_MODEL:
            return self.names[0]
        if asked not in self.names:
            told = f"the model {shortened(asked)!r} is not served here; there is {', '.join(self.names)}"
            raise ProtocolError(told, "model", status=404, code="model_not_found")
        return asked

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        return Prompt(text, self.codec.encode(text, add_special_tokens))

    def finish_prompt(self, name: str, prompt: Prompt, truncate: int | None) -> Prompt:
        """The prompt cut to its last ``truncate`` tokens (-1: to what can be served), and checked."""
        ids = prompt.token_ids
        if truncate is not None:
            most = self.max_prompt_tokens if truncate == -1 else truncate
            if len(ids) > most:
                ids = ids[-most:]
                prompt = Prompt(self.codec.decode(ids) if prompt.text is not None else None, ids)
        self.check_length(name, len(ids))
        try:
            return encode_prompt(self.codec, prompt)
        except InvalidRequestError as error:
            raise ProtocolError(str(error) if name in str(error) else f"{name}: {error}", name) from error

    def check_length(self, name: str, num_tokens: int) -> None:
        """Raises ProtocolError for a prompt that is too long."""
        if num_tokens > self.max_prompt_tokens:
            told = f"{name} has {num_tokens} tokens; at most {self.max_prompt_tokens} can be served"
            # Clients look for these words, and cut the prompt or choose another model when they find them.
            told = f"{told}: this model's maximum context length is {self.max_model_len} tokens"
            raise ProtocolError(told, name, code="context_length_exceeded")

    def prompts(
        self, name: str, value: str | Sequence[str | int | list[int]], add_special_tokens: bool, truncate: int | None
    ) -> list[Prompt]:
        """OpenAI's four forms: a string, strings, token ids, lists of token ids."""
        one = isinstance(value, str) or _are_integers(value)
        several: Sequence[Any] = [value] if one else value
        if len(several) > self.limits.max_prompts:
            raise ProtocolError(f"{name} holds {len(several)} prompts; the limit is {self.limits.max_prompts}", name)
        found = []
        for place, each in enumerate(several):
            own = name if one else f"{name}[{place}]"
            found.append(self.finish_prompt(own, self._prompt(own, each, add_special_tokens), truncate))
        return found

    def _prompt(self, name: str, value: str | list[int] | int, add_special_tokens: bool) -> Prompt:
        if isinstance(value, str):
            return self.encode(value, add_special_tokens=add_special_tokens)
        if isinstance(value, int):
            raise ProtocolError(f"{name} is a token id among texts or lists; give all prompts in one form", name)
        self.check_ids(name, value)
        return Prompt(None, value)

    def token_ids(self, name: str, ids: Sequence[int] | None) -> list[int] | None:
        """A field of token ids, each told once.

        Raises:
            ProtocolError: some are outside the vocabulary.
        """
        if ids is None:
            return None
        self.check_ids(name, ids)
        return list(dict.fromkeys(ids))

    def check_ids(self, name: str, ids: Collection[int]) -> None:
        """Raises ProtocolError for ids outside the vocabulary."""
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < self._vocab_size:
                told = f"{name} holds token id {token}; ids go from 0 to {self._vocab_size - 1}"
                raise ProtocolError(told, name)

    def finish_params(
        self,
        params: SamplingParams,
        prompts: Sequence[Prompt],
        grammar: Grammar | None,
        *,
        copies: int,
        named: Names,
    ) -> SamplingParams:
        """``params`` with all that takes time done, but for compiling ``grammar``: bad words are token ids.

        ``copies``: how often the answer tells of each prompt's tokens.

        Raises:
            ProtocolError: all together come to more than the limit.
        """
        params = prepare_params(self.codec, params)
        check_sizes(params, prompts, self.max_model_len, self.limits.max_values, copies=copies, named=named)
        return params if grammar is None else replace(params, logits_processors=(grammar,))

    def prepare_grammars(self) -> None:
        """Make now what the first grammar needs (see ``Grammars.prepare``)."""
        self._grammars.prepare()

    def grammar(self, structure: Structure | None, *, ignore_eos: bool = False) -> Grammar | None:
        """What an answer must follow. It is to be compiled before its request goes to the engine.

        Raises:
            ProtocolError: there is no such grammar.
        """
        if structure is None:
            return None
        name = structure.field
        if ignore_eos:
            raise ProtocolError(f"{name} can't go with ignore_eos: a fulfilled structure ends with that token", name)
        try:
            return self._grammars.grammar(name, structure.kind, structure.value, structure.form, structure.sources)
        except (InvalidRequestError, PluginError) as error:
            raise ProtocolError(f"{name}: {error}", name) from error

    @cached_property
    def _grammars(self) -> Grammars:
        from paged_serving.grammars.grammars import Grammars  # needs torch, which is there where an engine is

        return Grammars(self.codec, self._vocab_size, self._eos_token_ids, self.limits.max_grammar_ms)

    @cached_property
    def special_texts(self) -> Mapping[str, int]:
        """Tokens that no text can spell in a grammar, by what they stand for."""
        ids = sorted({*self.codec.special_token_ids, *self._eos_token_ids})
        return {text: token for token in ids if (text := self.tokens[token])}

    def default_max_tokens(self, usual: int | None) -> int | None:
        """The length of an answer without ``max_tokens``: the ``usual``, within the limit."""
        limits = [limit for limit in (usual, self.limits.max_tokens) if limit is not None]
        return min(limits, default=None)

    def check_limits(self, params: SamplingParams, named: Names) -> None:
        """Raises ProtocolError, naming the limit that is passed."""
        limits = self.limits
        asked: tuple[tuple[str, int | None, int | None], ...] = (
            ("n", params.n, limits.max_n),
            ("max_tokens", params.max_tokens, limits.max_tokens),
            ("stop", len(params.stop), limits.max_stop),
            ("bad_words", len(params.bad_words), limits.max_stop),
            ("logprobs", params.logprobs, limits.max_logprobs),
            ("prompt_logprobs", params.prompt_logprobs, limits.max_logprobs),
        )
        for name, texts in (("stop", params.stop), ("bad_words", params.bad_words)):
            if sum(map(len, texts)) > _MAX_TEXT:
                told = f"the texts of {named.get(name, name)} are longer than {_MAX_TEXT} characters together"
                raise ProtocolError(told, named.get(name, name))
        for name, value, most in asked:
            if value is not None and most is not None and value > most:
                own = named.get(name, name)
                raise ProtocolError(f"{own} asks for {value}; this server's limit is {most}", own)


def _response_template(codec: TextCodec, wanted: str | None, reasoning: bool | None) -> ResponseTemplate | None:
    if wanted == "none":
        return None
    found = of_model(codec.response_template, codec.chat_template) if wanted is None else given(wanted)
    if found is None or reasoning:
        return found
    if reasoning is None:
        return that_reasons_as(found, codec.chat_template)
    return found.only(lambda field: field is not found.reasoning)


def _template_options(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if (taken := taken_name(given)) is not None:
        raise ConfigError(f"the variables for the chat template may not hold {taken!r}; leave it out")
    return given


def _are_integers(values: Sequence[Any]) -> bool:
    return all(isinstance(each, int) for each in values)


def _max_prompt_tokens(engine: AsyncEngine, limits: RequestLimits) -> int:
    """What the limits, the model and the K/V cache take; beyond a sliding window nothing stays in the cache."""
    sizes, layers = engine.sizes, engine.engine.spec.layers
    most = sizes.max_model_len - 1
    if any(layer.sliding_window is None for layer in layers):
        most = min(most, sizes.num_blocks * sizes.block_size)
    return most if limits.max_prompt_tokens is None else min(most, limits.max_prompt_tokens)


def sampling_params(named: Names, **fields: Any) -> SamplingParams:
    """SamplingParams; what they refuse is told with the field at fault, as ``named`` has it."""
    try:
        return SamplingParams(**fields)
    except InvalidRequestError as error:
        raise in_words_of(named, error) from error
