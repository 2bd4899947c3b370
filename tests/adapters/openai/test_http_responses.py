"""/v1/responses, as OpenAI's SDK and openai-agents use it, unchanged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alphabet_model import AlphabetModel, Gate
from http_server import Running, alphabet_server
from paged_openai.app import AppOptions
from paged_serving import items_page
from paged_serving.conversation.turns import ToolCall, Turn

HI: Any = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with alphabet_server(options=AppOptions(api_keys=("key",), max_stored_responses=3)) as running:
        yield running


@pytest.fixture(scope="module")
def gpt(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def raw(server: Running) -> Iterator[httpx2.Client]:
    with server.client(headers={"x-api-key": "key"}) as client:
        yield client


# ---- /v1/responses -----------------------------------------------------------------------------------------------


def test_a_response_has_openais_shape(gpt: openai.OpenAI) -> None:
    answer = gpt.responses.create(model="alphabet", input="Hi", max_output_tokens=4, temperature=0, metadata={"a": "b"})
    assert answer.output_text == ";<=>"
    assert (answer.status, answer.model, answer.metadata) == ("incomplete", "alphabet", {"a": "b"})
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None and answer.usage.output_tokens == 4
    ended = gpt.responses.create(model="alphabet", input=HI, temperature=0, extra_body={"stop": ">"})
    assert (ended.status, ended.output_text, ended.output[0].type) == ("completed", ";<=", "message")


def test_a_responses_events_are_openais_and_join_to_the_plain_answer(gpt: openai.OpenAI) -> None:
    asked: Any = {"model": "alphabet", "input": HI, "temperature": 0, "extra_body": {"stop": "?"}}
    with gpt.responses.stream(**asked) as stream:
        events = list(stream)
        joined = stream.get_final_response()
    names = [event.type for event in events]
    assert names[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]  # fmt: skip
    assert names[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.completed"]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ";<=>"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    plain = gpt.responses.create(**asked)
    assert joined.output_text == plain.output_text
    assert joined.usage is not None and plain.usage is not None
    assert joined.usage.output_tokens == plain.usage.output_tokens


def test_what_was_cut_is_told_as_such_in_events_too(gpt: openai.OpenAI) -> None:
    with gpt.responses.stream(model="alphabet", input=HI, temperature=0, max_output_tokens=3) as stream:
        events = list(stream)
    done: Any = next(event for event in events if event.type == "response.output_item.done")
    last: Any = events[-1]
    assert (last.type, done.item.status) == ("response.incomplete", "incomplete")
    assert last.response.output[0].model_dump(exclude={"content"}) == done.item.model_dump(exclude={"content"})


def test_items_that_were_told_can_be_referred_to(gpt: openai.OpenAI, raw: httpx2.Client) -> None:
    def prompt_of(said: list[Any]) -> int:
        asked = [{"role": "user", "content": "AB"}, *said, {"role": "user", "content": "CD"}]
        answer = gpt.responses.create(model="alphabet", input=asked, max_output_tokens=2, store=False)
        assert answer.usage is not None
        return answer.usage.input_tokens

    first = gpt.responses.create(model="alphabet", input="AB", max_output_tokens=2, temperature=0)
    told = first.output[0].id
    spelt = prompt_of([{"role": "assistant", "content": ";<"}])
    assert prompt_of([{"type": "item_reference", "id": told}]) == prompt_of([{"id": told}]) == spelt
    for wrong, field in (
        ({"id": "msg_0"}, "id: 'msg_0' is not kept"),
        ({}, "id is missing"),
        ({"id": 1}, "id is miss"),
    ):
        with pytest.raises(openai.APIStatusError, match=rf"input\[1\].{field}"):
            prompt_of([{"type": "item_reference", **wrong}])
    gpt.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="Send the item itself"):
        prompt_of([{"type": "item_reference", "id": told}])


def test_a_response_goes_on_from_another_and_its_instructions_dont(gpt: openai.OpenAI, raw: httpx2.Client) -> None:
    def prompt_of(**body: Any) -> int:
        answer = gpt.responses.create(model="alphabet", max_output_tokens=2, temperature=0, **body)
        ids.append(answer.id)
        assert answer.usage is not None
        return answer.usage.input_tokens

    ids: list[str] = []
    first = prompt_of(input="AB", instructions="Be brief.")
    second = prompt_of(input="CD", previous_response_id=ids[0])
    said = [
        {"role": "user", "content": "AB"},
        {"role": "assistant", "content": ";<"},
        {"role": "user", "content": "CD"},
    ]
    assert second == prompt_of(input=said, store=False) != first
    assert prompt_of(input="EF", previous_response_id=ids[1]) > second, "and that one's too"
    for gone in (ids[2], "resp_0", "x" * 500):  # of store=False, and of nobody's
        with pytest.raises(openai.NotFoundError, match="not kept here"):
            prompt_of(input="x", previous_response_id=gone)
    for _ in range(3):
        prompt_of(input="x")
    with pytest.raises(openai.NotFoundError):
        prompt_of(input="x", previous_response_id=ids[0])


def test_a_response_can_be_asked_for_again_and_deleted(gpt: openai.OpenAI, raw: httpx2.Client) -> None:
    asked: Any = {"model": "alphabet", "input": "Hi", "temperature": 0, "extra_body": {"stop": "?"}}
    plain = gpt.responses.create(**asked)
    with gpt.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    for answer in (plain, streamed):
        assert gpt.responses.retrieve(answer.id).model_dump(exclude_unset=True) == answer.model_dump(
            exclude_unset=True,
            exclude={"output_parsed": True, "output": {"__all__": {"content": {"__all__": {"parsed"}}}}},
        )
    with pytest.raises(openai.BadRequestError, match="has ended"):
        gpt.responses.retrieve(plain.id, stream=True)
    assert raw.delete(f"/v1/responses/{plain.id}").json() == {"id": plain.id, "object": "response", "deleted": True}
    for gone in (plain.id, "resp_0", gpt.responses.create(**asked, store=False).id):
        with pytest.raises(openai.NotFoundError, match="is not kept here"):
            gpt.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError):
            gpt.responses.delete(gone)
        with pytest.raises(openai.NotFoundError):
            gpt.responses.create(**asked, previous_response_id=gone)


def test_what_a_response_was_asked_is_told_as_items(gpt: openai.OpenAI) -> None:
    talk: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "A"}, {"type": "input_text", "text": "B"}]},
        {"role": "assistant", "content": "C"},
        {"role": "user", "content": "D"},
    ]
    first = gpt.responses.create(model="alphabet", input=talk, instructions="Spell.", max_output_tokens=2)
    then = gpt.responses.create(model="alphabet", input="E", previous_response_id=first.id, max_output_tokens=2)
    items: list[Any] = list(gpt.responses.input_items.list(then.id, order="asc", limit=2))  # page after page
    said = [(item.role, [(part.type, part.text) for part in item.content]) for item in items]
    assert said == [
        ("user", [("input_text", "A"), ("input_text", "B")]),
        ("assistant", [("output_text", "C")]),
        ("user", [("input_text", "D")]),
        ("assistant", [("output_text", first.output_text)]),
        ("user", [("input_text", "E")]),
    ]
    assert [item.id for item in gpt.responses.input_items.list(then.id)] == [item.id for item in reversed(items)]
    for query, param in (({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"after": "msg_0"}, "after")):
        with pytest.raises(openai.BadRequestError) as refused:
            gpt.responses.input_items.list(then.id, **query)
        assert refused.value.param == param
    gpt.responses.delete(then.id)
    with pytest.raises(openai.NotFoundError, match="is not kept here"):
        gpt.responses.input_items.list(then.id)


def test_calls_and_thoughts_are_items_too() -> None:
    call = ToolCall("c1", "f", '{"a": 1}')
    turns = [Turn("user", "Hi"), Turn("assistant", None, reasoning="hm", tool_calls=[call]),
             Turn("tool", ["1", "2"], tool_call_id="c1")]  # fmt: skip
    page = items_page(turns, "resp_1", {"order": "asc", "limit": "3"})
    assert [item["type"] for item in page["data"]] == ["message", "reasoning", "function_call"]
    assert page["data"][2] | {"call_id": "c1", "arguments": '{"a": 1}'} == page["data"][2]
    rest = items_page(turns, "resp_1", {"order": "asc", "after": page["last_id"]})
    assert [(item["type"], item["call_id"], item["output"]) for item in rest["data"]] == [
        ("function_call_output", "c1", "12")
    ]
    assert (page["has_more"], rest["has_more"]) == (True, False)


@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.one_of(st.none(), st.text(max_size=20), st.sampled_from(["", ".", "..", "/", "%", "x" * 2000])),
    path=st.sampled_from(["", "/", "/input_items", "/cancel"]),
    method=st.sampled_from(["GET", "DELETE", "POST", "HEAD", "PUT"]),
    query=st.dictionaries(st.sampled_from(["limit", "order", "after", "stream", "x"]), st.text(max_size=9), max_size=3),
)
def test_any_question_about_a_response_is_answered_in_openais_form(
    raw: httpx2.Client, name: str | None, path: str, method: str, query: dict[str, str]
) -> None:
    """``name`` None: of one that is there."""
    if name is None:
        name = raw.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1}).json()["id"]
    answer = raw.request(method, f"/v1/responses/{quote(name, safe='')}{path}", params=query)
    assert answer.status_code in (200, 400, 404, 405), answer.text
    if method != "HEAD":
        told = answer.json()
        assert told["object"] in ("response", "list") if answer.status_code == 200 else told["error"]["message"]


def test_a_responses_text_follows_a_schema(gpt: openai.OpenAI) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    answer = gpt.responses.create(model="alphabet", input="Hi", text=text, max_output_tokens=200)
    assert json.loads(answer.output_text) == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"background": True}, "background"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"conversation": "x"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    ],
)
def test_what_a_response_cannot_have_is_refused_by_name(raw: httpx2.Client, fields: dict[str, Any], param: str) -> None:
    refused = raw.post("/v1/responses", json={"input": "Hi", **fields})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert refused.json()["error"]["message"].startswith(param)


def test_a_responses_late_error_is_an_event_of_its_own(gate: Gate) -> None:
    with alphabet_server(AlphabetModel(gate), timeout_s=0.3) as server, server.client() as client:
        gate.shuts_at = 3
        for path, body in (
            ("/v1/responses", {"input": "Hi"}),
            ("/v1/messages", {"messages": HI, "max_tokens": 50}),
        ):
            gate.num_steps, gate.shuts_at = 0, 3
            text = client.post(path, json={**body, "stream": True, "temperature": 0}).text
            gate.open()
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
            assert "event: error" in text.splitlines()[-3:], text
            assert events[-1]["type"] == "error"
            assert "was not done in" in json.dumps(events[-1])
            if path == "/v1/responses":
                assert [event["sequence_number"] for event in events] == list(range(len(events)))
                assert len(events) > 4


# ---- openai-agents -----------------------------------------------------------------------------------------------


def test_openai_agents_run(server: Running) -> None:
    import agents

    agents.set_tracing_disabled(True)

    async def main() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
            model = agents.OpenAIResponsesModel("alphabet", client)
            settings = agents.ModelSettings(temperature=0, extra_body={"stop": "?"})
            agent = agents.Agent(name="speller", instructions="Spell.", model=model, model_settings=settings)
            plain = await agents.Runner.run(agent, "Hi")
            streamed = agents.Runner.run_streamed(agent, "Hi")
            async for _ in streamed.stream_events():
                pass
            return str(plain.final_output), str(streamed.final_output)

    assert asyncio.run(main()) == (";<=>", ";<=>")
