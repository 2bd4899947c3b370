"""Chat messages reach the model, whichever form of content its template reads; else they are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paged_core import InvalidRequestError
from paged_core.text.codec import TextCodec
from paged_core.text.prompts import encode_prompt
from toy_tokenizers import ByteTokenizer

PRINTS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
JOINS = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
TRIMS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim | upper }}{% endfor %}"
QUOTES = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | tojson }}{% endfor %}"
PARTS = """{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}{% if c['type'] == 'text' %}
{{- c['text'] }}{% endif %}{% endfor %}{% endfor %}"""  # Llama Guard's kind
SELECTS = """{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}
{{- c['text'] }}{% endfor %}{% endfor %}"""
FIRST = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'][0]['text'] }}{% endfor %}"
BOTH = """{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}{% else %}
{%- for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"""
MIXED = """{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'system' %}{{ m['content'] }}{% else %}
{%- for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"""
MIXED_STRICT = MIXED.replace("{{ m['content'] }}", "{{ m['content'] + '' }}")
NO_SYSTEM = """{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}]
{%- for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"""
LAST_TWO = "{% for m in messages[-2:] %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
THOUGHTS = """{% for m in messages %}[{{ m['role'] }}]{{ m['content'].split('</think>')[-1] }}{% endfor %}"""
LOSES = "{% for m in messages %}[{{ m['role'] }}]{% endfor %}"
ONLY_SYSTEM = "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
POLITE = """{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}""" + JOINS


class Templated(ByteTokenizer):
    """With a template in Jinja, rendered as transformers does it."""

    def __init__(self, template: str) -> None:
        super().__init__()
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = json.dumps
        environment.globals["raise_exception"] = self._refuse
        self._template = environment.from_string(template)
        self.num_rendered = 0

    def __deepcopy__(self, memo: object) -> Templated:
        return self

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        self.num_rendered += 1
        return self._template.render(messages=messages, **options)

    @staticmethod
    def _refuse(told: str) -> None:
        raise ValueError(told)


def render(template: str, *messages: tuple[str, Any]) -> str:
    codec = TextCodec(Templated(template))
    rendered = codec.render_chat([{"role": role, "content": content} for role, content in messages])
    again = codec.render_chat([{"role": role, "content": content} for role, content in messages])
    assert rendered == again, "what was found out once is kept"
    return rendered


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("content", ["a\\b 'c'", parts("a\\b 'c'")], ids=["string", "parts"])
@pytest.mark.parametrize("template", [PRINTS, JOINS, PARTS, SELECTS, FIRST, BOTH, MIXED, MIXED_STRICT, NO_SYSTEM])
def test_a_text_arrives_whatever_form_the_template_reads(template: str, content: Any) -> None:
    assert render(template, ("user", content)) == "[user]a\\b 'c'"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PRINTS, "[user]one\ntwo"),
        (JOINS, "[user]one\ntwo"),
        (PARTS, "[user]onetwo"),
        (SELECTS, "[user]onetwo"),
        (BOTH, "[user]onetwo"),
        (FIRST, "[user]one\ntwo"),
        (TRIMS, "[user]ONE\nTWO"),
    ],
)
def test_no_part_is_lost(template: str, expected: str) -> None:
    assert render(template, ("user", parts("one", "two"))) == expected


@pytest.mark.parametrize("system", ["be kind", parts("be kind")], ids=["string", "parts"])
@pytest.mark.parametrize("user", ["hi", parts("hi")], ids=["string", "parts"])
@pytest.mark.parametrize("template", [PRINTS, JOINS, PARTS, SELECTS, BOTH, MIXED, MIXED_STRICT])
def test_each_role_has_the_form_that_is_read_of_it(template: str, system: Any, user: Any) -> None:
    assert render(template, ("system", system), ("user", user)) == "[system]be kind[user]hi"


def test_what_a_template_leaves_out_by_design_is_left_out() -> None:
    assert render(NO_SYSTEM, ("system", "be kind"), ("user", "hi")) == "[user]hi"
    talk = [("user", "one"), ("assistant", "two"), ("user", "three")]
    assert render(LAST_TWO, *talk) == "[assistant]two[user]three"
    thought = ("assistant", "<think>hm</think>two")
    assert render(THOUGHTS, talk[0], thought, talk[2]) == "[user]one[assistant]two[user]three"
    assert render(THOUGHTS, talk[0], thought) == "[user]one[assistant]two"


@pytest.mark.parametrize("content", ["hi", parts("hi")], ids=["string", "parts"])
def test_a_template_that_quotes_is_followed(content: Any) -> None:
    assert render(QUOTES, ("user", content)) == '[user]"hi"'


@pytest.mark.parametrize("content", ["e", parts("e"), parts("e", "s")], ids=["string", "parts", "two"])
@pytest.mark.parametrize("template", [LOSES, ONLY_SYSTEM])
def test_a_template_that_loses_the_users_text_is_refused(template: str, content: Any) -> None:
    """Though the letter is found in what is rendered: in the role's name."""
    with pytest.raises(InvalidRequestError, match=r"leaves out the text of message 1 \(user\)"):
        render(template, ("system", "be kind"), ("user", content))


def test_what_the_template_itself_refuses_is_told_in_its_words() -> None:
    with pytest.raises(InvalidRequestError, match="refused the messages: the user speaks first"):
        render(POLITE, ("assistant", "hi"))
    assert render(POLITE, ("user", "hi")) == "[user]hi"


@pytest.mark.parametrize("content", ["", " ", [], parts("")])
def test_a_message_without_text_has_none_to_lose(content: Any) -> None:
    assert render(PRINTS, ("user", content)).strip() == "[user]"
    assert render(PRINTS, ("user", "hi"), ("assistant", None)) == "[user]hi[assistant]None"
    assert render(BOTH, ("user", "hi"), ("assistant", content)).startswith("[user]hi[assistant]")


@pytest.mark.parametrize(
    "content",
    [5, {"text": "hi"}, b"hi", ["hi"], [{"type": "image_url", "image_url": "x"}], [{"type": "text"}],
     [*parts("hi"), {"type": "image"}], [{"type": "text", "text": 5}], [{"type": "text", "text": "hi", "image": 1}]],
)  # fmt: skip
def test_what_is_no_text_is_refused(content: Any) -> None:
    codec = TextCodec(Templated(BOTH))
    with pytest.raises(InvalidRequestError, match="must be a string or a list of text parts"):
        encode_prompt(codec, [{"role": "user", "content": content}])


def test_a_hint_in_a_part_changes_nothing() -> None:
    assert render(PARTS, ("user", [{**parts("hi")[0], "cache_control": {"type": "ephemeral"}}])) == "[user]hi"


def test_the_template_is_rendered_once_where_its_form_is_known() -> None:
    tokenizer = Templated(PARTS)
    codec, chat = TextCodec(tokenizer), [{"role": "user", "content": "hi"}]
    codec.render_chat(chat)
    before = tokenizer.num_rendered
    codec.render_chat(chat * 5)
    assert tokenizer.num_rendered == before + 1


def test_a_conversation_that_was_refused_spoils_no_later_one() -> None:
    codec = TextCodec(Templated(POLITE.replace(JOINS, BOTH)))
    user, assistant = {"role": "user", "content": parts("one", "two")}, {"role": "assistant", "content": "three"}
    with pytest.raises(InvalidRequestError, match="the user speaks first"):
        codec.render_chat([assistant, user])
    assert codec.render_chat([user, assistant]) == "[user]onetwo[assistant]three", "parts, as the template reads them"


def test_what_a_callers_own_options_make_of_a_template_is_no_others() -> None:
    codec = TextCodec(Templated("{% if plain %}" + PRINTS + "{% else %}" + PARTS + "{% endif %}"))
    chat = [{"role": "user", "content": "hi"}]
    for options in ({"plain": True}, {}, {"plain": True}, {"add_generation_prompt": False}):
        assert codec.render_chat(chat, **options) == "[user]hi"


def test_an_early_message_that_is_printed_does_not_stand_for_the_last() -> None:
    only_first = PRINTS.replace("in messages", "in messages[:1]")
    assert render(only_first, ("user", "one")) == "[user]one"
    with pytest.raises(InvalidRequestError, match="leaves out the text of message 1"):
        render(only_first, ("user", "one"), ("user", "two"))


def test_strange_roles_without_end_take_no_memory_without_end() -> None:
    codec = TextCodec(Templated(PRINTS))
    for number in range(300):
        codec.render_chat([{"role": f"{number}", "content": "hi"}])
        codec.render_chat([{"role": "x" * (100 + number), "content": "hi"}])
    assert len(codec._chat._forms) <= 64
    assert all(len(kind.role) < 100 for shape in codec._chat._forms for kind in shape)
