"""Chooses the response template of a model: a given one, the tokenizer's own, or one of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from paged_core import ConfigError
from paged_serving.response_templates.template import ResponseTemplate, TemplateError, load

_FOLDER = Path(__file__).parent / "known"


@cache
def known() -> Mapping[str, ResponseTemplate]:
    """Ours, by name."""
    found = {}
    for path in sorted(_FOLDER.glob("*.json"), key=lambda path: path.stem):
        found[path.stem] = load(json.loads(path.read_text(encoding="utf-8")), path.stem)
    return found


def given(named: str) -> ResponseTemplate:
    """One of ours by its name, or the one in a file.

    Raises:
        ConfigError: there is none of that name, or the file holds none.
    """
    if named in known():
        return known()[named]
    try:
        return load(json.loads(Path(named).read_text(encoding="utf-8")), named)
    except (OSError, UnicodeDecodeError) as error:
        told = f"the response template {named!r} is no file that can be read ({error}), and none of those known here"
        raise ConfigError(f"{told}: {', '.join(known())}") from error
    except (json.JSONDecodeError, TemplateError) as error:
        raise ConfigError(f"the response template in {named} can't be used: {error}") from error


def of_model(own: Any, chat_template: str) -> ResponseTemplate | None:
    """The tokenizer's ``own`` (its ``response_template``), if it has one; else ours, of which the most markers stand in
    the source of its chat template; None: the model's format is unknown.

    Raises:
        ConfigError: its own can't be used.
    """
    if own is not None:
        try:
            return load(own, "the tokenizer's own")
        except TemplateError as error:
            raise ConfigError(f"the tokenizer's response template can't be used: {error}; give another") from error
    fitting = [each for each in known().values() if all(marker in chat_template for marker in each.chat_template_has)]
    found = max(fitting, key=lambda each: len(each.chat_template_has), default=None)
    return None if found is None else that_reasons_as(found, chat_template)


def that_reasons_as(template: ResponseTemplate, chat_template: str) -> ResponseTemplate:
    """One of ours without reasoning, if the chat template doesn't know it: plain models' answers are left as they are,
    and a grammar lets them think nothing. Others say themselves what their models do."""
    if known().get(template.name) is not template:
        return template
    field = template.reasoning
    if field is None or field.open is None or field.open.pattern.search(chat_template.replace("\\n", "\n")):
        return template
    return template.only(lambda each: each is not field)
