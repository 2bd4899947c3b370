"""The fields that ask for structured output, in the spellings of OpenAI, vLLM and TGI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from msgspec import Meta, field

from paged_serving.grammars.form import JsonForm
from paged_serving.grammars.sources import Sources
from paged_serving.protocol.bodies import Body, Text, listed, must
from paged_serving.protocol.parsing import refuse
from paged_serving.protocol.sampling_body import SamplingBody

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
    form: JsonForm = JsonForm()  # of JSON
    sources: Sources | None = None  # of a grammar that is made of other fields


class NamedSchema(Body, frozen=True):
    """OpenAI's wrapping of a schema; schemas are always followed strictly."""

    schema: dict[str, Any]
    name: Any = None
    description: Any = None
    strict: Any = None


class ResponseFormat(Body, frozen=True):
    """OpenAI's; with a ``value``, as TGI has it and huggingface_hub sends it; with a ``schema``, as others do."""

    type: Literal["text", "json_object", "json_schema", "json", "regex"]
    json_schema: NamedSchema | None = None
    value: Annotated[str | dict[str, Any], must("a JSON schema, or of type regex an expression")] | None = None
    schema: dict[str, Any] | None = None


class StructuredOutputs(Body, frozen=True):
    """vLLM's."""

    elsewhere: ClassVar[Mapping[str, str]] = {"structural_tag": "can't be honoured; spell it as a grammar"}
    json: JSONSchema | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None


class OpenAIStructures(SamplingBody, frozen=True, kw_only=True):
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
    if asked is None or asked == "text":
        return
    if isinstance(asked, str):
        asked = ResponseFormat(type="json_object")
    named = asked.json_schema.schema if asked.json_schema is not None else None
    given = [each for each in (named, asked.value, asked.schema) if each is not None]
    if len(given) > 1 or (given and asked.type == "text") or (named is not None and asked.type != "json_schema"):
        wrong = "json_schema" if asked.json_schema is not None else "a value"
        refuse("response_format", f"may not hold {wrong} beside type {asked.type!r} and what else it holds")
    if not given and asked.type not in ("text", "json_object"):
        needed = "a value" if asked.type in ("json", "regex") else "a json_schema with a schema"
        refuse("response_format", f"needs {needed}")
    if asked.type == "regex":
        if not isinstance(given[0], str):
            refuse("response_format.value", "must be an expression: a string")
        yield Structure("response_format", "regex", given[0])
    elif asked.type != "text":
        yield Structure("response_format", "json", _unwrapped(given[0]) if given else _OBJECT)


def _unwrapped(schema: str | dict[str, Any]) -> Any:
    """TGI takes a schema inside its name, as OpenAI wraps it, too."""
    if isinstance(schema, dict) and isinstance(schema.get("schema"), dict) and "type" not in schema:
        return schema["schema"]
    return schema


def _form(body: OpenAIStructures) -> JsonForm:
    """vLLM's fields for white space: inside ``structured_outputs``, or, as ``guided_...``, beside it."""
    outputs = body.structured_outputs
    pattern = outputs.whitespace_pattern if outputs.whitespace_pattern is not None else body.guided_whitespace_pattern
    if outputs.disable_any_whitespace and pattern is not None:
        told = "can't go with disable_any_whitespace; leave one of them out"
        refuse("structured_outputs.whitespace_pattern", told)
    return JsonForm(outputs.disable_any_whitespace, pattern)
