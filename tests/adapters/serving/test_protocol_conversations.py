"""Three protocols, one conversation: what OpenAI's chats, its responses and Anthropic's messages mean alike."""

from __future__ import annotations

from typing import Any

import pytest

from paged_core import InvalidRequestError, TextCodec
from paged_serving.conversation.blocks import ContentBlocks
from paged_serving.conversation.events import (
    ArgumentsDelta,
    Finish,
    ReasoningDelta,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
)
from paged_serving.conversation.rendering import render
from paged_serving.conversation.turns import Conversation, Turn
from paged_serving.protocol import anthropic_body, chat_body, responses_body
from paged_serving.protocol.anthropic_body import MessagesBody
from paged_serving.protocol.bodies import Body
from paged_serving.protocol.chat_body import ChatBody
from paged_serving.protocol.parsing import ProtocolError
from paged_serving.protocol.reading import read_body
from paged_serving.protocol.response_store import ResponseStore
from paged_serving.protocol.responses_body import ResponsesBody
from tiny_folder import byte_tokenizer

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}


class Served:
    strict_fields = True
    defaults: dict[str, float] = {}  # noqa: RUF012

    def default_max_tokens(self, usual: int | None) -> int | None:
        return usual


def read(body: type[Body], value: dict[str, Any]) -> Any:
    return read_body(body, value, Served())


def chat(**value: Any) -> Conversation:
    return chat_body.to_conversation(read(ChatBody, value))


def responses(**value: Any) -> Conversation:
    return responses_body.to_conversation(read(ResponsesBody, value), ())


def messages(**value: Any) -> Conversation:
    return anthropic_body.to_conversation(read(MessagesBody, {"max_tokens": 5, **value}))


def plain(turns: Any) -> list[Any]:
    """With text parts joined: protocols cut texts differently."""
    join = lambda content: content if content is None or isinstance(content, str) else "".join(content)  # noqa: E731
    return [(turn.role, join(turn.content), list(turn.tool_calls), turn.tool_call_id, turn.reasoning) for turn in turns]


def test_a_talk_with_tools_is_the_same_in_all_three() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    function = {"name": "weather", "description": "of a city", "parameters": PARAMETERS, "strict": True}
    of_chat = chat(
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "How"}, {"type": "text", "text": " is it?"}]},
            {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
            {"role": "user", "content": "Thanks"},
        ],
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    of_responses = responses(
        instructions="Be kind.",
        input=[
            {"role": "user",
             "content": [{"type": "input_text", "text": "How"}, {"type": "input_text", "text": " is it?"}]},
            {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "id": "m", "status": "completed",
             "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
            {"type": "function_call", "id": "f", "call_id": "c1", "name": "weather", "arguments": '{"city": "Bonn"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"role": "user", "content": "Thanks"},
        ],
        tools=[{"type": "function", **function}],
        tool_choice={"type": "function", "name": "weather"},
    )  # fmt: skip
    of_messages = messages(
        system=[{"type": "text", "text": "Be kind."}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "How"}, {"type": "text", "text": " is it?"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bonn"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "Thanks"},
            ]},
        ],
        tools=[{"name": "weather", "description": "of a city", "input_schema": PARAMETERS, "strict": True}],
        tool_choice={"type": "tool", "name": "weather"},
    )  # fmt: skip
    assert plain(of_chat.turns) == plain(of_responses.turns) == plain(of_messages.turns)
    assert of_chat.tools == of_responses.tools == of_messages.tools
    assert of_chat.choice == of_responses.choice == of_messages.choice


@pytest.mark.parametrize(
    ("of_chat", "of_responses", "of_messages"),
    [
        ("none", "none", {"type": "none"}),
        ("auto", "auto", {"type": "auto"}),
        ("required", "required", {"type": "any"}),
    ],
)
def test_choices_are_the_same(of_chat: Any, of_responses: Any, of_messages: Any) -> None:
    said: Any = [{"role": "user", "content": "x"}]
    tool = {"name": "f", "parameters": PARAMETERS}
    found = [
        chat(messages=said, tools=[{"type": "function", "function": tool}], tool_choice=of_chat),
        responses(input="x", tools=[{"type": "function", **tool}], tool_choice=of_responses),
        messages(messages=said, tools=[{"name": "f", "input_schema": PARAMETERS}], tool_choice=of_messages),
    ]
    assert found[0].choice == found[1].choice == found[2].choice


def test_what_the_assistant_has_begun_is_gone_on_with() -> None:
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "So"}]
    assert messages(messages=said).continues_last
    assert not messages(messages=said[:1]).continues_last


def test_a_template_is_told_whether_to_think() -> None:
    said = [{"role": "user", "content": "x"}]
    for kind, told in (("enabled", True), ("adaptive", True), ("disabled", False)):
        asked = messages(messages=said, thinking={"type": kind})
        assert (asked.thinks, asked.template_options) == (told, {})
    assert responses(input="x", reasoning={"effort": "low"}).reasoning_effort == "low"
    assert responses(input="x", reasoning={"effort": "none"}).reasoning_effort == "none"


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking", None])
def test_it_is_told_by_the_switch_that_it_reads(switch: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = f"{{{{ messages[0].content }}}}:{{{{ {switch or 'nothing'} }}}}"
    for thinks in (True, False):
        asked = Conversation([Turn("user", "x")], thinks=thinks)
        assert render(TextCodec(tokenizer), asked) == f"x:{thinks if switch else ''}"


def test_what_the_server_tells_the_template_holds_until_a_request_says_otherwise() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}:{{ enable_thinking }}:{{ day }}"
    defaults = {"enable_thinking": False, "day": 1}
    for asked, told in (({}, "x:False:1"), ({"thinks": True}, "x:True:1"), ({"reasoning_effort": "low"}, "x:True:1"),
                        ({"template_options": {"day": 2}}, "x:False:2")):  # fmt: skip
        assert render(TextCodec(tokenizer), Conversation([Turn("user", "x")], **asked), defaults) == told


# ---- blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shows_calls", [True, False])
def test_a_template_that_tells_of_tools_and_not_of_calls_is_refused(shows_calls: bool) -> None:
    tokenizer = byte_tokenizer()
    of_calls = "{%- for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}" if shows_calls else ""
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}"
        + f"{{{{ m.role }}}}: {{{{ m.content or '' }}}}{of_calls}\n{{% endfor %}}"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    talk = chat(
        messages=[
            {"role": "user", "content": "Is weather good?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        ],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}],
    )
    codec = TextCodec(tokenizer)
    if shows_calls:
        assert "assistant: [weather]" in render(codec, talk)
    else:
        with pytest.raises(InvalidRequestError, match="leaves out calls of tools, such as that of weather"):
            render(codec, talk)


def test_events_become_blocks_that_open_grow_and_close() -> None:
    blocks = ContentBlocks()
    news = [
        (each.what, each.block.kind, each.block.index, each.text)
        for each in blocks.feed(
            [
                ReasoningDelta("a"),
                ReasoningDelta("b"),
                TextDelta("c"),
                ToolCallStart(0, "i", "f"),
                ArgumentsDelta(0, "{"),
                ArgumentsDelta(0, "}"),
                ToolCallEnd(0),
                ToolCallStart(1, "j", "g"),
                ArgumentsDelta(1, "{}"),
                ToolCallEnd(1),
                TextDelta("d"),
                Finish("stop", None, 9),
            ]
        )
    ]
    assert [what for what, *_ in news] == [
        "opened", "grown", "grown", "closed", "opened", "grown", "closed", "opened", "grown", "grown", "closed",
        "opened", "grown", "closed", "opened", "grown", "closed",
    ]  # fmt: skip
    assert [(each.kind, each.text, each.call_id, each.name) for each in blocks.all] == [
        ("reasoning", "ab", "", ""), ("text", "c", "", ""), ("call", "{}", "i", "f"), ("call", "{}", "j", "g"),
        ("text", "d", "", ""),
    ]  # fmt: skip
    assert [each.index for each in blocks.all] == list(range(5))


@pytest.mark.parametrize(
    ("events", "cut"),
    [
        ([TextDelta("a"), Finish("length", None, 1)], [True]),
        ([TextDelta("a"), Finish("stop", None, 1)], [False]),
        ([Finish("length", None, 1)], [True]),
        ([TextDelta("a"), ToolCallStart(0, "i", "f"), ToolCallEnd(0), Finish("length", None, 1)], [False, False]),
    ],
)
def test_a_block_knows_that_it_was_cut_when_it_is_closed(events: Any, cut: list[bool]) -> None:
    blocks = ContentBlocks()
    assert [news.block.cut for news in blocks.feed(events) if news.what == "closed"] == cut


def test_an_empty_answer_has_one_empty_text() -> None:
    blocks = ContentBlocks()
    assert [news.what for news in blocks.feed([Finish("stop", None, 1)])] == ["opened", "closed"]
    assert [(each.kind, each.text) for each in blocks.all] == [("text", "")]


# ---- the store ---------------------------------------------------------------------------------------------------


def test_the_store_keeps_the_newest_and_no_more_than_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResponseStore(2)
    for name in ("a", "b"):
        store.put(name, [Turn("user", name)], {})
    assert store.turns("a") == [Turn("user", "a")]
    store.put("c", [Turn("user", "c")], {})
    with pytest.raises(ProtocolError, match="2 newest"):
        store.turns("b")  # "a" was used since
    assert store.turns("a") and store.turns("c")
    monkeypatch.setattr("paged_serving.protocol.response_store._MAX_CHARACTERS", 1000)
    store.put("d", [Turn("user", "x" * 900)], {})
    store.put("e", [Turn("user", "x" * 900)], {})
    assert store.turns("e")
    for gone in ("a", "c", "d"):
        with pytest.raises(ProtocolError):
            store.turns(gone)
    store.put("f", [], {"text": "x" * 900})
    with pytest.raises(ProtocolError):
        store.turns("e")  # what was answered counts too
    store.delete("f")
    store.put("g", [Turn("user", "x" * 900)], {})
    assert store.turns("g"), "what was deleted counts no more"
    none = ResponseStore(0)
    none.put("a", [Turn("user", "a")], {})
    with pytest.raises(ProtocolError):
        none.turns("a")
