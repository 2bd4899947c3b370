"""What the handler answers, as TorchServe's worker calls it; no server, no sockets."""

from __future__ import annotations

import json
import re
import threading
import warnings
from typing import Any

import pytest

import paged_torchserve.handler
from toy_tokenizers import CharacterTokenizer, DeafTokenizer, PartsTokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # it leaves a file open
    from ts.context import Context
    from ts.utils.util import list_classes_from_module
from torchserve_worker import REST, FakeCache, slow
from waiting import until


def test_its_module_defines_one_class_as_torchserve_wants():
    assert list_classes_from_module(paged_torchserve.handler) == [paged_torchserve.handler.PagedHandler]


def test_a_configuration_without_continuous_batching_is_refused(monkeypatch):
    context = Context("m", "/nowhere", None, 8, None, "0.12.0", True, FakeCache(), {})
    with pytest.raises(ValueError, match="continuousBatching: true"):
        paged_torchserve.handler.PagedHandler().initialize(context)


PLAIN = "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    "parts",
    [
        {"body": "abc"},
        {"body": bytearray(b"abc")},
        {"data": "abc", "max_new_tokens": bytearray(b"100")},
        {"body": {"data": "abc"}},
        {"data": bytearray(b"abc")},  # a form
        {"data": "abc", "temperature": bytearray(b"1.0")},
        {"body": bytearray(b'{"prompt": "abc"}')},
        {"body": {"prompt": "abc", "max_new_tokens": 100}},
        {"body": {"prompt": "abc", "parameters": {"max_tokens": 100}}},
        {"body": {"data": {"prompt": "abc", "parameters": {}}}},
        {"body": {"text": "abc"}},
    ],
)
def test_what_stock_handlers_take_is_answered_in_plain_text_that_begins_with_the_prompt(worker, parts):
    reply = worker().ask(parts)
    assert (reply.status, reply.content_type) == (200, PLAIN)
    assert reply.text == REST


def test_a_list_of_prompts_is_answered_by_a_list_of_texts(worker):
    assert worker(max_new_tokens=3).ask({"body": ["abc", "mn"]}).json == ["abcdef", "mnopq"]


def test_the_prompt_may_be_left_out_of_the_answer_by_the_archive_and_by_the_request(worker):
    without = worker(return_full_text=False, max_new_tokens=3)
    assert without.ask({"body": "abc"}).text == "def"
    assert without.ask({"body": {"prompt": "abc", "return_full_text": True}}).text == "abcdef"


def test_plain_text_can_be_streamed(worker):
    reply = worker(max_new_tokens=20).ask({"body": {"prompt": "abc", "stream": True}})
    assert reply.text == "abcdefghijklmnopqrstuvw"
    assert reply.content_type == PLAIN


def test_tgis_form_is_answered_as_tgi_does(worker):
    body = {"inputs": "abc", "parameters": {"max_new_tokens": 3, "details": True}}
    (answer,) = worker().ask({"body": body}).json
    assert answer["generated_text"] == "def"
    assert answer["details"]["generated_tokens"] == 3
    events = worker().ask({"body": {**body, "stream": True}}).events
    assert [event["token"]["text"] for event in events] == ["d", "e", "f"]
    assert events[-1]["generated_text"] == "def"


def test_openais_routes_are_answered_as_openai_does(worker):
    serving = worker()
    plain = {"body": {"model": "m", "prompt": "abc", "max_tokens": 3}}
    assert serving.ask(plain, "v1/completions").json["choices"][0]["text"] == "def"
    chat = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 3, "stream": True}
    events = serving.ask({"body": chat}, "v1/chat/completions").events
    assert events[-1] == "[DONE]"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == ";<="


@pytest.mark.parametrize("content", ["abc", [{"type": "text", "text": "abc"}]], ids=["string", "parts"])
def test_chats_are_given_to_the_template_in_the_form_that_it_reads(worker, monkeypatch, content):
    chat = {"body": {"messages": [{"role": "user", "content": content}], "max_tokens": 3, "return_token_ids": True}}
    monkeypatch.setattr(CharacterTokenizer, "apply_chat_template", PartsTokenizer.apply_chat_template)
    answer = worker().ask(chat, "v1/chat/completions").json
    assert answer["prompt_token_ids"] == CharacterTokenizer().encode("user: abc assistant:")
    monkeypatch.setattr(CharacterTokenizer, "apply_chat_template", DeafTokenizer.apply_chat_template)
    refused = worker().ask(chat, "v1/chat/completions")
    assert refused.status == 400 and refused.json["error"]["param"] == "messages"
    assert "leaves out the text of message 0 (user)" in refused.json["error"]["message"]


def test_a_body_that_torchserve_has_not_decoded_is_read(worker):
    body = bytearray(json.dumps({"prompt": "abc", "max_tokens": 3}).encode())
    assert worker().ask({"body": body}, "v1/completions").json["choices"][0]["text"] == "def"


@pytest.mark.parametrize(
    ("parts", "route", "status", "told"),
    [
        ({}, "", 422, "no prompt"),
        ({"body": ""}, "", 422, "empty"),
        ({"body": bytearray(b"\xff\xfe\x00")}, "", 422, "neither text"),
        ({"body": 7}, "", 422, "data must be a string"),
        ({"body": ["a", 7]}, "", 422, "list of strings"),
        ({"body": {"prompt": "abc", "temperature": "hot"}}, "", 422, "temperature"),
        ({"body": {"prompt": "abc", "num_beams": 4}}, "", 422, "num_beams"),
        ({"body": {"prompt": "abc", "details": True}}, "", 422, "details"),
        ({"body": {"prompt": "a" * 5000}}, "", 422, "tokens"),
        ({"body": "abc"}, "v1/nothing", 404, "nothing at v1/nothing"),
        ({"body": {"model": "other", "prompt": "abc"}}, "v1/completions", 404, "other"),
        ({"body": bytearray(b"{")}, "v1/completions", 400, "JSON"),
        ({"body": {"prompt": "abc", "n": 0}}, "v1/completions", 400, "n is 0"),
    ],
)
def test_a_request_that_asks_the_impossible_is_told_so_and_others_go_on(worker, parts, route, status, told):
    serving = worker()
    serving.post("good", {"body": {"prompt": "!", "max_new_tokens": 40}})
    serving.step()
    serving.post("bad", parts, route)
    serving.run_until_told("bad")
    bad = serving.replies["bad"]
    assert bad.status == status
    assert told in str(bad.json["error"])
    serving.run()
    assert serving.replies["good"].text == "".join(map(chr, range(33, 74)))


def test_what_only_the_engine_can_refuse_has_a_status_of_its_own_too(worker):
    reply = worker(max_num_seqs=4).ask({"body": {"prompt": "abc", "n": 9}}, "v1/completions")
    assert reply.status == 400
    assert "sequences" in reply.json["error"]["message"]


def test_an_answer_longer_than_a_message_comes_in_pieces(worker):
    reply = worker(max_reply_bytes=10).ask({"body": "abc"})
    assert reply.text == REST
    assert max(len(body) for body, _ in reply.messages) == 10


@pytest.mark.parametrize(
    ("headers", "end"),
    [({}, True), ({"Host": "here"}, None)],
    ids=["gRPC", "workflow"],
)
def test_who_takes_one_message_gets_nothing_before_it(worker, headers, end):
    serving = worker(slow(0.02))
    serving.send("r", {"body": bytearray(b'{"prompt": "abc", "max_new_tokens": 9, "stream": true}')}, headers)
    serving.post("beside", {"body": "abc"})
    serving.run()
    assert serving.replies["r"].messages == [(b"abcdefghijkl", end)]
    assert serving.replies["beside"].text == REST
    serving.send("long", {"body": "a" * 1000}, headers)
    serving.run()
    ((told, _),) = serving.replies["long"].messages
    assert "tokens" in json.loads(told)["error"]


def test_whoever_takes_one_message_hears_that_his_answer_was_cut(worker):
    serving = worker(slow(0.05), heartbeat_s=0.2)
    serving.send("r", {"body": {"prompt": "abc", "stream": True, "max_new_tokens": 90}}, {})
    serving.step()
    until(lambda: not serving.engine.has_work)
    serving.run()
    ((told, _),) = serving.replies["r"].messages
    assert "cut off" in json.loads(told)["error"]


def test_each_prompt_of_a_list_follows_the_grammar_by_itself(worker):
    grammar = {"type": "regex", "value": "[a-c][0-9]{3}"}
    parameters = {"grammar": grammar, "return_full_text": False, "max_new_tokens": 20}
    reply = worker().ask({"body": {"prompt": ["A", "ABCDEFGH", "AB"], "parameters": parameters}})
    assert len(reply.json) == 3
    assert all(re.fullmatch("[a-c][0-9]{3}", text) for text in reply.json), reply.json


def test_others_get_their_news_while_a_grammar_is_compiled(worker, monkeypatch):
    compiled = threading.Event()
    monkeypatch.setattr("paged_serving.grammars.trials.Trials.verdict", lambda *_: compiled.wait(30) and "it is bad")
    running = worker()
    names = [f"slow{number}" for number in range(12)]
    for number, name in enumerate(names):
        grammar = {"type": "regex", "value": f"a{number}"}
        running.post(name, {"body": {"inputs": "A", "parameters": {"grammar": grammar}}})
    running.step()
    running.post("quick", {"body": {"prompt": "A", "max_new_tokens": 5, "return_full_text": False}})
    while "quick" in running.waiting:
        running.step()
    assert running.replies["quick"].text == "BCDEF"
    assert set(names) == set(running.waiting)
    compiled.set()
    running.run()
    assert all("it is bad" in running.replies[name].text for name in names)


def test_a_grammar_that_is_refused_has_its_status(worker):
    grammar = {"type": "json", "value": {"type": 5}}
    reply = worker().ask({"body": {"inputs": "A", "parameters": {"grammar": grammar}}})
    assert reply.status == 422
    assert "parameters.grammar" in reply.text


def test_a_long_list_of_prompts_is_read_beside_the_others(worker, monkeypatch):
    serving = worker(slow(0.01))
    release = threading.Event()
    encode = CharacterTokenizer.encode

    def hold(self: Any, text: str, *args: Any, **kwargs: Any) -> Any:
        if text == "held":
            assert release.wait(30)
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(CharacterTokenizer, "encode", hold)
    serving.post("good", {"body": {"prompt": "!", "max_new_tokens": 40}})
    serving.step()
    serving.post("long", {"body": ["held"] * 3})
    while "good" in serving.waiting:
        serving.step()
    release.set()
    serving.run()
    assert len(serving.replies["good"].text) == 41
    assert len(json.loads(serving.replies["long"].text)) == 3
    assert serving.ask({"body": ["a"] * 257}).status == 422
