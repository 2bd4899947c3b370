"""The fields that ask for structured output, in the spellings of OpenAI, vLLM and TGI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from paged_serving.grammars.form import Form
from paged_serving.protocol.fields import Fields, shortened

_OBJECT = {"type": "object"}
_SCHEMA = {"type": ["object", "string"]}
_SCHEMA_FIELDS = ("name", "description", "schema", "strict")  # of OpenAI's; schemas are always followed strictly
_FORMAT = {
    "anyOf": [
        {"enum": ["text", "json_object"]},
        {"type": "object", "properties": {"type": {"enum": ["text", "json_object", "json_schema", None]}}},
    ]
}


class Structure(NamedTuple):
    """What an answer must look like."""

    field: str  # that asked for it
    kind: str  # "json", "regex", "choice", "grammar"
    value: Any
    form: Form = Form()  # of JSON


def openai_structure(fields: Fields) -> Structure | None:
    """``response_format``, vLLM's ``structured_outputs``, or one of its older ``guided_...`` fields."""
    inner = fields.inner("structured_outputs")
    form = _form(inner, fields)
    found = [_response_format(fields), *_vllm(inner, ""), *_vllm(fields, "guided_")]
    asked = [each._replace(form=form) for each in found if each is not None]
    if len(asked) > 1:
        names = " and ".join(each.field for each in asked)
        raise fields.error(asked[1].field, f"is one too many: an answer can't follow {names}")
    return asked[0] if asked else None


def tgi_structure(fields: Fields) -> Structure | None:
    """TGI's ``grammar``: a type and a value."""
    grammar = fields.inner("grammar")
    kind, value = grammar.text("type"), grammar.any("value", _SCHEMA)
    grammar.finish()
    if kind is None and value is None:
        return None
    if kind == "json_schema" and isinstance(value, Mapping):
        kind, value = "json", value.get("schema")
    if kind not in ("json", "regex") or not isinstance(value, str if kind == "regex" else (str, Mapping)):
        raise fields.error("grammar", 'must have type "json" and a schema, or type "regex" and an expression')
    return Structure(fields.path("grammar"), kind, value)


def _form(inner: Fields, outer: Fields) -> Form:
    """vLLM's fields for white space: inside ``structured_outputs``, or, as ``guided_...``, beside it."""
    without = inner.flag("disable_any_whitespace")
    patterns = [inner.text("whitespace_pattern"), outer.text("guided_whitespace_pattern")]
    pattern = next((each for each in patterns if each is not None), None)
    if without and pattern is not None:
        raise inner.error("whitespace_pattern", "can't go with disable_any_whitespace; leave one of them out")
    return Form(without, pattern)


def _response_format(fields: Fields) -> Structure | None:
    form = fields.any("response_format", _FORMAT)
    kind = form.get("type") if isinstance(form, Mapping) else form
    known = ("type", "json_schema") if kind == "json_schema" else ("type",)
    for name in form if isinstance(form, Mapping) else ():
        if name not in known and form[name] is not None:
            raise fields.error("response_format", f"may not hold {shortened(name)!r} beside this type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return Structure("response_format", "json", _OBJECT)
    schema = form.get("json_schema") if isinstance(form, Mapping) and kind == "json_schema" else None
    if not isinstance(schema, Mapping) or not isinstance(schema.get("schema"), Mapping):
        told = 'must be of type "text", "json_object", or "json_schema" with a json_schema.schema'
        raise fields.error("response_format", told)
    for name in schema:
        if name not in _SCHEMA_FIELDS:
            raise fields.error("response_format", f"has a json_schema that may not hold {shortened(name)!r}")
    return Structure("response_format", "json", schema["schema"])


def _vllm(fields: Fields, prefix: str) -> list[Structure | None]:
    found = [_one(fields, f"{prefix}{kind}", kind) for kind in ("json", "regex", "choice", "grammar")]
    if not prefix:
        if fields.flag("json_object"):
            found.append(Structure(fields.path("json_object"), "json", _OBJECT))
        fields.finish()
    return found


def _one(fields: Fields, name: str, kind: str) -> Structure | None:
    if kind == "choice":
        choices = fields.texts(name, least=1)
        return Structure(fields.path(name), kind, choices) if choices else None
    value = fields.any(name, _SCHEMA if kind == "json" else {"type": "string"})
    if value is not None and not isinstance(value, (str, Mapping) if kind == "json" else str):
        raise fields.error(name, "must be a JSON schema" if kind == "json" else "must be a string")
    return None if value is None else Structure(fields.path(name), kind, value)
