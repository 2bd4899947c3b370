"""What one request brings must never fail the others."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from typing import Any

import pytest

from paged_core import TextCodec
from paged_torchserve import bodies
from torchserve_worker import slow
from toy_tokenizers import CharacterTokenizer
from waiting import until

LONE = "\ud800"  # half a surrogate pair, which TorchServe's JSON lets pass


@pytest.mark.parametrize(
    ("body", "route"),
    [
        ({"prompt": f"a{LONE}"}, ""),
        ({"prompt": "a", LONE: 1}, ""),
        ([f"a{LONE}", "b"], ""),
        ({"inputs": "a", "parameters": {"stop": [LONE]}}, "generate"),
        ({"prompt": "a", "model": LONE}, "v1/completions"),
        ({"messages": [{"role": "user", "content": LONE}]}, "v1/chat/completions"),
        ({"prompt": "a"}, f"nothing/{LONE}"),
    ],
)
def test_text_that_is_no_unicode_is_refused_and_others_go_on(worker, body, route):
    serving = worker()
    serving.post("good", {"body": {"prompt": "!", "max_new_tokens": 40}})
    serving.post("bad", {"body": body}, route)
    serving.run()
    assert serving.replies["bad"].status in (400, 404, 422)
    assert serving.replies["bad"].json["error"]
    assert serving.replies["good"].text == "".join(map(chr, range(33, 74)))


def test_an_error_that_cant_be_told_ends_the_reply_all_the_same(worker, monkeypatch):
    def broken(error: Exception) -> Any:
        raise RuntimeError("no words")

    serving = worker()
    monkeypatch.setattr(bodies, "TEXT", bodies.TEXT._replace(error=broken))
    logging.disable(logging.CRITICAL)
    try:
        reply = serving.ask({"body": ""})
    finally:
        logging.disable(logging.NOTSET)
    assert reply.status == 500
    assert "log" in reply.json["error"]


def test_an_error_late_in_streamed_plain_text_is_a_last_line_of_json(worker):
    serving = worker(slow(0.05), heartbeat_s=0.2)
    serving.post("r", {"body": {"prompt": "abc", "stream": True, "max_new_tokens": 90}})
    while not any(body for body, _ in serving.replies["r"].messages):
        serving.step()
    until(lambda: not serving.engine.has_work)
    serving.run()
    *text, last, rest = serving.replies["r"].text.split("\n")
    assert "".join(text).startswith("abc")
    assert "cut off" in json.loads(last)["error"]
    assert rest == ""


def test_a_request_that_another_worker_had_begun_is_ended_with_an_error(worker):
    """The frontend hands the requests of a worker that was scaled away to the next one, without their bodies."""
    worker()  # of the same model, before
    serving = worker()
    serving.post("plain", {}, headers={"content-length": "24"})
    serving.post("events", {}, "v1/completions", headers={"Content-Length": "24"})
    serving.run()
    ends = [end for _, end in serving.replies["plain"].messages]
    assert ends == [False, True]  # "the whole" would leave a client without an end
    assert "ask again" in json.loads(serving.replies["plain"].text)["error"]
    assert b'data: {"error"' in serving.replies["events"].messages[0][0]
    assert serving.replies["plain"].status == 200  # more would close the connection before the body


def test_a_body_that_the_frontend_lost_is_refused_where_no_other_worker_was(worker):
    serving = worker()
    headers = {"content-length": "24", "content-type": "application/x-www-form-urlencoded"}
    serving.post("r", {}, headers=headers)
    serving.run()
    reply = serving.replies["r"]
    assert (reply.status, [end for _, end in reply.messages]) == (422, [None])
    assert "text/plain" in reply.json["error"]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, StopIteration])
def test_a_tokenizer_that_raises_on_one_prompt_costs_that_request_only(worker, monkeypatch, kind):
    encode = CharacterTokenizer.encode

    def choking(self, text, *args, **options):
        if "!" in text:
            raise kind
        return encode(self, text, *args, **options)

    monkeypatch.setattr(CharacterTokenizer, "encode", choking)
    served = worker()
    served.post("bad", {"data": "A!"})
    served.post("good", {"data": "A"})
    served.run()
    assert served.replies["bad"].status == 500
    assert served.replies["good"].status == 200
    assert served.ask({"data": "A"}).text.startswith("ABC")


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, StopIteration])
@pytest.mark.parametrize("route", ["generate", "generate_stream"])
def test_a_tokenizer_that_raises_as_the_answer_is_told_costs_that_request_only(worker, monkeypatch, kind, route):
    decode = CharacterTokenizer.decode

    def choking(self, token_ids, **options):
        text = decode(self, token_ids, **options)
        if "!" in text and threading.current_thread().name != "paged-engine":
            raise kind
        return text

    monkeypatch.setattr(CharacterTokenizer, "decode", choking)
    served = worker()
    served.post("bad", {"body": {"inputs": " ", "parameters": {"details": True}}}, route)
    served.post("good", {"data": "A"})
    served.run()
    assert '"error":"the server failed' in served.replies["bad"].text  # its status may have gone out before
    assert served.replies["good"].status == 200
    assert served.ask({"data": "A"}).text.startswith("ABC")


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, StopIteration])
def test_a_tokenizer_whose_vocabulary_cant_be_read_costs_requests_with_grammars_only(worker, monkeypatch, caplog, kind):
    def choking(self, token):
        raise kind

    monkeypatch.setattr(TextCodec, "token_bytes", choking)
    served = worker()
    assert f"structured output is not available: {kind.__name__}" in caplog.text
    served.post("bad", {"data": "A", "grammar": {"type": "regex", "value": "B+"}})
    served.post("good", {"data": "A"})
    served.run()
    assert '"error":"the server failed' in served.replies["bad"].text
    assert served.replies["good"].status == 200
