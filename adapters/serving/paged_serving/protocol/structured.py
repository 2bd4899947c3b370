"""The fields that ask for structured output, in the spellings of OpenAI, vLLM and TGI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta, field

from paged_serving.grammars.form import Form
from paged_serving.protocol.bodies import Body, Text, listed, must
from paged_serving.protocol.parsing import refuse

_OBJECT = {"type": "object"}

JSONSchema = Annotated[str | dict[str, Any], must("a JSON schema")]  # a string holds one
Choices = Annotated[
    Text | Annotated[list[Text], Meta(min_length=1)],
    must("a string or a list of at least one string, none of them empty"),
]


class Structure(NamedTuple):
    """What an answer must look like."""

    field: str  # that asked for it
    kind: str  # "json", "regex", "choice", "grammar"
    value: Any
    form: Form = Form()  # of JSON


class NamedSchema(Body, frozen=True):
    """OpenAI's wrapping of a schema; schemas are always followed strictly."""

    schema: dict[str, Any]
    name: Any = None
    description: Any = None
    strict: Any = None


class ResponseFormat(Body, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Body, frozen=True):
    """vLLM's."""

    json: JSONSchema | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None


class OpenAIStructures(Body, frozen=True):
    """Every field that asks for a structure, on OpenAI's two routes."""

    response_format: (
        Annotated[
            Literal["text", "json_object"] | ResponseFormat,
            must('{"type": "text"}, {"type": "json_object"}, or of type "json_schema" with a json_schema.schema'),
        ]
        | None
    ) = None
    structured_outputs: StructuredOutputs = field(default_factory=StructuredOutputs)
    guided_json: JSONSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None


class TGIGrammar(Body, frozen=True):
    type: str | None = None
    value: Annotated[str | dict[str, Any], must("a JSON schema or an expression")] | None = None


def openai_structure(body: OpenAIStructures) -> Structure | None:
    """``response_format``, vLLM's ``structured_outputs``, or one of its older ``guided_...`` fields.

    Raises:
        ProtocolError: there are several of them, or they don't go together.
    """
    form = _form(body)
    asked = [each._replace(form=form) for each in _asked(body)]
    if len(asked) > 1:
        names = " and ".join(each.field for each in asked)
        refuse(asked[1].field, f"is one too many: an answer can't follow {names}")
    return asked[0] if asked else None


def tgi_structure(grammar: TGIGrammar) -> Structure | None:
    """TGI's ``grammar``: a type and a value."""
    kind, value = grammar.type, grammar.value
    if kind is None and value is None:
        return None
    if kind == "json_schema" and isinstance(value, dict):
        kind, value = "json", value.get("schema")
    if kind not in ("json", "regex") or not isinstance(value, str if kind == "regex" else (str, dict)):
        refuse("parameters.grammar", 'must have type "json" and a schema, or type "regex" and an expression')
    return Structure("parameters.grammar", kind, value)


def _asked(body: OpenAIStructures) -> Iterator[Structure]:
    outputs = body.structured_outputs
    yield from _response_format(body.response_format)
    for kind in ("json", "regex", "choice", "grammar"):
        if (value := getattr(outputs, kind)) is not None:
            yield Structure(f"structured_outputs.{kind}", kind, listed(value) if kind == "choice" else value)
    if outputs.json_object:
        yield Structure("structured_outputs.json_object", "json", _OBJECT)
    for kind in ("json", "regex", "choice", "grammar"):
        if (value := getattr(body, f"guided_{kind}")) is not None:
            yield Structure(f"guided_{kind}", kind, listed(value) if kind == "choice" else value)


def _response_format(asked: str | ResponseFormat | None) -> Iterator[Structure]:
    kind = asked.type if isinstance(asked, ResponseFormat) else asked
    named = asked.json_schema if isinstance(asked, ResponseFormat) else None
    if (kind == "json_schema") is not (named is not None):
        wrong = (
            "needs a json_schema with a schema" if named is None else f"may not hold json_schema beside type {kind!r}"
        )
        refuse("response_format", wrong)
    if kind == "json_object":
        yield Structure("response_format", "json", _OBJECT)
    if named is not None:
        yield Structure("response_format", "json", named.schema)


def _form(body: OpenAIStructures) -> Form:
    """vLLM's fields for white space: inside ``structured_outputs``, or, as ``guided_...``, beside it."""
    outputs = body.structured_outputs
    pattern = outputs.whitespace_pattern if outputs.whitespace_pattern is not None else body.guided_whitespace_pattern
    if outputs.disable_any_whitespace and pattern is not None:
        told = "can't go with disable_any_whitespace; leave one of them out"
        refuse("structured_outputs.whitespace_pattern", told)
    return Form(outputs.disable_any_whitespace, pattern)
