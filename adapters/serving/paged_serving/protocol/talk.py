"""A conversation for one served model: its prompt, and the reader of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paged_core import InvalidRequestError, Prompt, SamplingParams, TextCodec
from paged_serving.conversation.reader import ChoiceReader, PlainText
from paged_serving.conversation.rendering import render
from paged_serving.conversation.turns import Conversation, Tool
from paged_serving.grammars.sources import Sources
from paged_serving.grammars.spelling import choice_rule, json_rule
from paged_serving.protocol.parsing import ProtocolError, refuse
from paged_serving.protocol.served import ServedModel
from paged_serving.protocol.structured import Structure
from paged_serving.protocol.template_options import taken_name
from paged_serving.response_templates.forcing import CallGrammar, SchemaError
from paged_serving.response_templates.parser import TemplateParser
from paged_serving.response_templates.template import ResponseTemplate, TemplateError

if TYPE_CHECKING:
    from paged_serving.grammars.grammars import Grammar

_NO_TOOLS = (
    "asks for tools, and how this model calls them isn't known here: its tokenizer has no response template, and its "
    "chat template has the marks of none that is. Give the server one: --response-template FILE (see docs/serving.md)"
)


@dataclass(frozen=True)
class Fields:
    """What the protocol at hand calls the parts of a conversation: errors name them."""

    turns: str = "messages"
    tools: str = "tools"
    schema: str = "tools[{}].function.parameters"  # of the tool at that place
    choice: str = "tool_choice"
    effort: str = "reasoning_effort"


@dataclass(frozen=True)
class Talk:
    """A conversation's prompt, grammar and reader."""

    prompt: Prompt  # not yet cut or checked for its length
    grammar: Grammar | None  # that the answer must follow; None: there is none, but what the structure alone asks for
    _template: ResponseTemplate | None  # by which the answer is read; None: it is text
    _tools: Sequence[Tool]
    _codec: TextCodec

    def reader(self, *, skip_special_tokens: bool = True) -> ChoiceReader:
        """A new choice's. ``skip_special_tokens``: as the client asked for it."""
        if self._template is None:
            return ChoiceReader(PlainText())
        silent = self._codec.special_texts if skip_special_tokens else ()
        parser = TemplateParser(self._template, self.prompt.text or "", tools=self._tools, silent=silent)
        return ChoiceReader(parser)

    def adapted(self, params: SamplingParams) -> SamplingParams:
        """The params with which the engine shows all markers to a reader."""
        return params if self._template is None else replace(params, skip_special_tokens=False)


def to_talk(
    conversation: Conversation,
    served: ServedModel,
    fields: Fields,
    *,
    add_special_tokens: bool = False,
    structure: Structure | None = None,
    ignore_eos: bool = False,
) -> Talk:
    """
    Args:
        add_special_tokens: those of the tokenizer beside those of the chat template.
        structure: what is said must look like.

    Raises:
        ProtocolError: the chat template refuses it, it has tools and the model's format of calls is unknown, or its
            template options have names that are not free.
    """
    tools = conversation.callable_tools
    template = served.response_template
    if tools and (template is None or template.calls is None):
        raise ProtocolError(f"{fields.tools} {_NO_TOOLS}", fields.tools)
    if (taken := taken_name(conversation.template_options)) is not None:
        refuse("chat_template_kwargs", f"may not hold {taken!r}")
    try:
        text = render(served.codec, conversation, served.template_options)
    except InvalidRequestError as error:
        named = {"tools": fields.tools, "reasoning_effort": fields.effort}
        why = f"{fields.effort} {error}" if error.param == "reasoning_effort" else str(error)
        raise ProtocolError(why, named.get(error.param or "", fields.turns)) from error
    prompt = served.encode(text, add_special_tokens=add_special_tokens)
    template = _needed(template, with_calls=bool(tools))
    whole = None if template is None else _whole_structure(template, text, conversation, served, structure, fields)
    grammar = served.grammar(whole, ignore_eos=ignore_eos)
    return Talk(prompt, grammar, template, tools, served.codec)


def _asked(conversation: Conversation, fields: Fields, structure: Structure | None) -> str | None:
    """The field that asks for a grammar, if one does."""
    if conversation.choice.mode == "required":
        return fields.choice
    if structure is not None:
        return structure.field
    tools = conversation.callable_tools
    one_by_one = bool(tools) and not conversation.choice.parallel
    return fields.tools if one_by_one or any(tool.strict for tool in tools) else None


def _whole_structure(
    template: ResponseTemplate,
    prompt: str,
    conversation: Conversation,
    served: ServedModel,
    structure: Structure | None,
    fields: Fields,
) -> Structure | None:
    """The structure of the whole answer, reasoning and calls included; None: there is none, or its own will do."""
    tools, choice, asked = conversation.callable_tools, conversation.choice, _asked(conversation, fields, structure)
    if asked is None or (not tools and template.reasoning is None):
        return None

    def schema_of(tool: Tool) -> str:
        return fields.schema.format(conversation.tools.index(tool))

    try:
        otherwise = _rule_of(structure) if structure is not None and choice.mode != "required" else None
        grammar = CallGrammar(template, prompt, served.special_texts)
        text = grammar.text(tools, choice, otherwise)
    except SchemaError as error:
        field = schema_of(error.tool)
        raise ProtocolError(f"{field}: {error}", field) from error
    except (TemplateError, InvalidRequestError) as error:
        raise ProtocolError(f"{asked} can't be followed: {error}", asked) from error
    whose = {line: schema_of(tool) for line, tool in grammar.tools_by_line.items()}
    return Structure(asked, "grammar", text, sources=Sources(text, whose))


def _rule_of(structure: Structure) -> str:
    """What is said, as a rule of a larger grammar."""
    if structure.kind == "json":
        return json_rule(structure.value, structure.form)
    if structure.kind == "choice":
        return choice_rule(structure.value)
    told = "reasoning or calls of tools can't stand before it; leave them out, or ask for a JSON schema"
    raise InvalidRequestError(f"it is of kind {structure.kind!r}: {told}")


def _needed(template: ResponseTemplate | None, *, with_calls: bool) -> ResponseTemplate | None:
    """The parts of a template that are needed: without tools nothing is read as a call; without reasoning and calls
    everything is text, unless text has markers too."""
    if template is None or with_calls:
        return template
    template = template.only(lambda field: field.name != "tool_calls")
    plain = template.reasoning is None and template.implicit is not None
    return None if plain else template
