"""For mkdocs: on the API page, the comment after a field is its description, and so is the text of an option."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import griffe

from paged_core import EngineConfig

_OPTIONS = {field.name: field.metadata["option"] for field in dataclasses.fields(EngineConfig)}


class FieldComments(griffe.Extension):
    """Gives a docstring to each field of a class that has none, if its source says what it is."""

    def on_attribute(self, *, attr: griffe.Attribute, **rest: Any) -> None:
        if attr.docstring is not None or attr.parent is None or not attr.parent.is_class:
            return
        of_option = attr.parent.name == "EngineConfig"
        text = _of_option(attr) if of_option else _comment(attr)
        attr.docstring = griffe.Docstring(text, parent=attr) if text else None
        attr.value = None if of_option else attr.value  # which repeats the text


def _of_option(attr: griffe.Attribute) -> str:
    option = _OPTIONS[attr.name]
    return f"{option.what} (left out: {option.default})"


def _comment(attr: griffe.Attribute) -> str | None:
    """What stands behind ``#`` in the field's last line."""
    found = re.search(r"  # (?!fmt:|noqa|type:)(.+)$", attr.source.rstrip())
    return found[1] if found else None
