"""How a field is written, for grammars: the reverse of reading with a template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paged_serving.response_templates.template import Field, Marker, TemplateError

_PLACEHOLDER = re.compile(r"\{(?:content\.)?(\w+)\}")
_SPACE = re.compile(r"\\s[*+]|\\n[*?]")
_TRIGGER_END = re.compile(r"\{name\}|\s")
_NAME = re.compile(r"\(\?P<name>(?:\[[^\]]*\]|\\.)[+*]?\)")
_ESCAPED = re.compile(r"\\([^\w\s])")
_SPECIAL = re.compile(r"[\\^$.|?*+()\[\]]")


@dataclass(frozen=True)
class Writing:
    """One field, as its models write it."""

    before: str  # what stands before the first call, or doesn't
    open: str  # "{name}" stands for what is called
    trigger: str  # that ``open`` begins with: no call is read without it
    close: str  # empty: the answer's end closes it
    name_key: str | None  # of the object that a call is; None: its name stands in ``open``
    arguments_key: str | None  # None: the arguments stand for themselves
    in_list: bool  # all calls stand in one list
    argument: str | None  # of arguments in tags: one of them, with "{key}" and "{value}"

    @property
    def after(self) -> str:
        """What of ``open`` comes after the trigger; space may be other space."""
        return self.open[len(self.trigger) :]


def writing(field: Field) -> Writing:
    """
    Raises:
        TemplateError: the template doesn't say it.
    """
    told = field.written
    name_key, arguments_key = _keys(field)
    begins = told["open"] if "open" in told else _plain(field.open, field.name)
    return Writing(
        before=told.get("before", ""),
        open=begins,
        trigger=told.get("trigger") or _TRIGGER_END.split(begins, maxsplit=1)[0],
        close=told["close"] if "close" in told else _plain(field.close, field.name),
        name_key=name_key,
        arguments_key=arguments_key,
        in_list=field.transform_each or field.content == "python-call-list",
        argument=told.get("argument"),
    )


def _keys(field: Field) -> tuple[str | None, str | None]:
    """Where in its content a call's name and arguments stand, by the field's transform."""
    function = field.transform.get("function") if isinstance(field.transform, Mapping) else field.transform
    if not isinstance(function, Mapping):
        return "name", "arguments"
    name, arguments = _key(function.get("name")), _key(function.get("arguments"))
    in_open = name == "name" and field.open is not None and "name" in field.open.pattern.groupindex
    return None if in_open else name, None if arguments == "content" else arguments


def _key(placeholder: Any) -> str | None:
    found = _PLACEHOLDER.fullmatch(placeholder) if isinstance(placeholder, str) else None
    return found[1] if found else None


def _plain(marker: Marker | None, name: str) -> str:
    """The text of a marker, if its expression has no more than space that may be, and a name."""
    if marker is None:
        return ""
    if marker.texts:
        return marker.texts[0]
    parts = [_ESCAPED.sub(r"\1", part) if not _SPECIAL.search(_ESCAPED.sub("", part)) else None
             for part in _NAME.split(_SPACE.sub("", marker.source))]  # fmt: skip
    if None in parts:
        told = f'how {name} is written can\'t be told from its expressions; give it "written"'
        raise TemplateError(f'{told}: {{"open": ..., "close": ...}}')
    return "{name}".join(part for part in parts if part is not None)
