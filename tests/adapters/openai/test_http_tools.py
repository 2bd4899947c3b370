"""Tools and reasoning over HTTP, as openai's client uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from free_ports import free_ports
from hermes_model import CHAT, SayingModel, hermes_tokenizer
from http_server import Running, alphabet_server, until
from tiny_folder import save

CITY = {"type": "string", "enum": ["Paris", "Rome"]}
PARAMETERS = {"type": "object", "properties": {"city": CITY, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
              "required": ["city", "days"]}  # fmt: skip
ARGUMENTS = '{"city": "Paris", "days": 2}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
ASKED: Any = [{"role": "user", "content": "How is the weather?"}]


def tool(**fields: Any) -> Any:
    return {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS, **fields}}


@pytest.fixture(scope="module")
def model() -> SayingModel:
    return SayingModel()


@pytest.fixture(scope="module")
def server(model: SayingModel) -> Iterator[Running]:
    with alphabet_server(model, tokenizer=hermes_tokenizer()) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"model": "alphabet", "messages": ASKED, "tools": [tool()], "temperature": 0, "max_tokens": 400, **fields}
    return client.chat.completions.create(**given)


def test_a_call_comes_as_openai_tells_it(client: openai.OpenAI, model: SayingModel) -> None:
    model.say(f"<think>\nI look it up.\n</think>\n\nOne moment.\n{CALL}")
    (choice,) = chat(client).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "One moment.")
    assert choice.message.reasoning_content == "I look it up."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "get_weather", ARGUMENTS)
    (choice,) = chat(client, extra_body={"include_reasoning": False}).choices
    assert not hasattr(choice.message, "reasoning_content")


def test_a_streamed_call_comes_to_the_same(client: openai.OpenAI, model: SayingModel) -> None:
    model.say(f"One moment.\n{CALL}\n{CALL}")
    plain = chat(client).choices[0].message
    texts, calls, ends = [], [], []
    for chunk in chat(client, stream=True):
        (choice,) = chunk.choices
        texts.append(choice.delta.content or "")
        calls += choice.delta.tool_calls or []
        ends.append(choice.finish_reason)
    assert "".join(texts) == plain.content == "One moment."
    assert [(each.index, each.function.name, each.function.arguments) for each in calls] == [
        (0, "get_weather", ""), (0, None, ARGUMENTS), (1, "get_weather", ""), (1, None, ARGUMENTS),
    ]  # fmt: skip
    assert len({each.id for each in calls if each.id}) == 2
    assert ends[-1] == "tool_calls" and set(ends[:-1]) == {None}
    with client.chat.completions.stream(model="alphabet", messages=ASKED, tools=[tool()], temperature=0) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [each.function.arguments for each in message.tool_calls or ()] == [ARGUMENTS] * 2


def test_while_a_call_forms_nothing_is_sent_but_a_sign_of_life(
    server: Running, model: SayingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"messages": ASKED, "tools": [tool()], "temperature": 0, "stream": True}
    model.say(CALL)

    def lines(**fields: Any) -> list[str]:
        with server.client() as http:
            told = http.post("/v1/chat/completions", json={**asked, **fields}).text
        return [line for line in told.split("\n") if line]

    told = lines()
    assert all(line.startswith("data: ") for line in told)
    assert len(told) == 5, "who speaks, the call's name, its arguments, the end, and that it is done"
    every = {"include_usage": True, "continuous_usage_stats": True}
    usages = [json.loads(line[6:])["usage"]["completion_tokens"] for line in lines(stream_options=every)[1:-1]]
    assert usages == sorted(usages) and len(set(usages)) > 20, "who counts tokens by what comes is told each"
    monkeypatch.setattr("paged_openai.responses._SILENCE_S", -1.0)
    alive = lines()
    assert [line for line in alive if line.startswith("data: ")][1:-1] != []
    assert len([line for line in alive if line.startswith(":")]) > 10
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        calls = [each for chunk in chat(client, stream=True) for each in chunk.choices[0].delta.tool_calls or []]
    assert [each.function.arguments for each in calls] == ["", ARGUMENTS]


def test_a_responses_usage_says_how_much_was_reasoning(client: openai.OpenAI, model: SayingModel) -> None:
    model.say("<think>\nI look it up.\n</think>\n\nIt rains.")
    asked: Any = {"model": "alphabet", "input": ASKED, "temperature": 0}
    plain = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    for answer in (plain, streamed):
        assert answer.output_text == "It rains." and answer.usage is not None
        assert answer.usage.output_tokens_details.reasoning_tokens == len("I look it up."), "a token is a byte"
        assert answer.usage.output_tokens > 40


def test_a_call_that_is_cut_is_not_told(client: openai.OpenAI, model: SayingModel) -> None:
    model.say(f"Hm.{CALL}{CALL}")
    most = len(f"Hm.{CALL}") + 40
    (choice,) = chat(client, max_tokens=most).choices
    assert (choice.finish_reason, choice.message.content, len(choice.message.tool_calls)) == ("length", "Hm.", 1)
    chunks = list(chat(client, max_tokens=most, stream=True))
    assert sum(len(chunk.choices[0].delta.tool_calls or ()) for chunk in chunks) == 2  # its name, its arguments
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_who_must_call_calls(client: openai.OpenAI, model: SayingModel, choice: Any) -> None:
    model.say('<tool_call>{"name": "get_weather", "arguments": {"city": "London"')
    (answer,) = chat(client, tool_choice=choice, parallel_tool_calls=False).choices
    (call,) = answer.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in CITY["enum"]


def test_strict_arguments_follow_the_schema_and_others_need_not(client: openai.OpenAI, model: SayingModel) -> None:
    model.say(CALL.replace("Paris", "Lima"))
    for strict, cities in ((True, CITY["enum"]), (False, ["Lima"])):
        (call,) = chat(client, tools=[tool(strict=strict)]).choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in cities


def test_one_call_is_the_most_where_they_may_not_be_parallel(client: openai.OpenAI, model: SayingModel) -> None:
    model.say(f"Well.{CALL}{CALL}")
    for parallel, num in ((True, 2), (False, 1)):
        assert len(chat(client, parallel_tool_calls=parallel).choices[0].message.tool_calls) == num


def test_what_the_tool_says_goes_back_to_the_model(client: openai.OpenAI, model: SayingModel, server: Running) -> None:
    model.say(CALL)
    message = chat(client).choices[0].message
    answered = [*ASKED, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    model.say("It is sunny.")
    answer = chat(client, messages=answered, extra_body={"return_token_ids": True})
    assert answer.choices[0].message.content == "It is sunny."
    prompt = server.service.served.codec.decode(answer.prompt_token_ids)
    assert f"{CALL}<|im_end|>\n<|im_start|>tool\nsunny<|im_end|>" in prompt


def test_no_tools_are_told_of_where_none_may_be_called(client: openai.OpenAI, model: SayingModel) -> None:
    model.say(CALL)
    for fields in ({"tool_choice": "none"}, {"tools": []}, {"tools": [], "tool_choice": "auto"}):
        answer = chat(client, **fields)
        assert answer.choices[0].message.content == CALL
        assert not answer.choices[0].message.tool_calls


def test_a_schema_holds_what_is_said_beside_reasoning_and_calls(client: openai.OpenAI, model: SayingModel) -> None:
    answer_format = {"type": "json_schema", "json_schema": {"name": "number", "schema": {"enum": [12, 34]}}}
    for said, wanted in ((f"<think>Hm.</think>{CALL}", None), ("<think>Hm.</think>no", "12"), ("34", "34")):
        model.say(said)
        message = chat(client, response_format=answer_format).choices[0].message
        assert message.content == wanted
        assert bool(message.tool_calls) is (wanted is None)
    model.say("<think>Hm.</think>no")
    assert chat(client, tools=[], response_format=answer_format).choices[0].message.content == "12"


def test_how_much_to_think_is_told_to_the_template(client: openai.OpenAI, model: SayingModel) -> None:
    model.say("Yes.")
    for effort, ends in (("none", "</think>\n\n"), ("low", "assistant\n")):
        answer = chat(client, reasoning_effort=effort, extra_body={"return_token_ids": True})
        assert bytes_of(answer.prompt_token_ids).endswith(ends)


def bytes_of(token_ids: Any) -> str:
    return str(hermes_tokenizer().decode(token_ids))


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.function.name",
            "not among the tools",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name", "1 to 128 letters"),
        (
            {"messages": [{**ASKED[0], "tool_call_id": "1"}]},
            "messages[0].tool_call_id",
            "role 'user'",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(client: openai.OpenAI, fields: Any, param: str, why: str) -> None:
    with pytest.raises(openai.BadRequestError, match=why) as refused:
        chat(client, **fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "frob"}, "can't be used: Invalid type: frob$"),
        ({"$ref": "#/nowhere"}, "Pointer '/nowhere' does not exist$"),
        ({"properties": 3}, "can't be used: .*roperties"),
        ({"properties": {"x": {"type": "string", "pattern": "(?=x)y"}}}, "look-behind, is not supported$"),
        ({"properties": {"x": {"minimum": 2**60}}}, "can't be followed: "),
    ],
)
def test_of_several_tools_the_schema_at_fault_is_named_by_its_place(
    client: openai.OpenAI, server: Running, schema: Any, why: str
) -> None:
    tools = [tool(name="good"), tool(name="bad", parameters={"type": "object", **schema})]
    flat: Any = [{"type": "function", **each["function"]} for each in tools]
    theirs = [{"name": each["name"], "input_schema": each["parameters"]} for each in flat]
    with pytest.raises(openai.BadRequestError, match=why) as refused:
        chat(client, tools=tools, tool_choice="required")
    assert refused.value.param == "tools[1].function.parameters"
    assert "rule_" not in str(refused.value), "nobody has written that"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="alphabet", input="x", tools=flat, tool_choice="required")
    assert refused.value.param == "tools[1].parameters"
    asked = {"model": "alphabet", "max_tokens": 9, "messages": ASKED, "tools": theirs, "tool_choice": {"type": "any"}}
    with server.client() as raw:
        told = raw.post("/v1/messages", json=asked).json()
    assert told["error"]["message"].startswith("tools[1].input_schema: ")


def test_a_schema_that_takes_too_long_is_named_by_its_place_too(client: openai.OpenAI) -> None:
    bomb = {"type": "object", "properties": {"x": {"type": "integer", "multipleOf": 99999989}}}
    with pytest.raises(openai.BadRequestError, match=r"--max-grammar-ms|MiB") as refused:
        chat(client, tools=[tool(name="good"), tool(name="bad", parameters=bomb)], tool_choice="required")
    assert refused.value.param == "tools[1].function.parameters"


def test_a_real_server_of_a_real_model_calls_tools(tmp_path: Path) -> None:
    tokenizer_folder = save(tmp_path / "model")
    (tokenizer_folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "paged_openai", "--model", str(tokenizer_folder), "--port", str(port),
               "--served-model-name", "alphabet", "--attention-backend", "reference", "--kv-bytes", "50M"]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            until(lambda: is_ready(client, process), 240)
            plain = chat(client, tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls
            jsonschema_rs.validate(PARAMETERS, json.loads(plain[0].function.arguments))
            chunks = chat(client, tool_choice="required", parallel_tool_calls=False, stream=True)
            pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            streamed = "".join(piece.function.arguments for piece in pieces)
            assert (pieces[0].function.name, streamed) == ("get_weather", plain[0].function.arguments)
    finally:
        process.kill()
        process.wait(60)


def is_ready(client: openai.OpenAI, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the server has ended"
    try:
        return bool(client.models.list().data)
    except openai.APIConnectionError:
        return False
