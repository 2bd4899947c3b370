"""The handler as TorchServe's worker calls it, with TorchServe's own context; no server, no sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import paged_torchserve.handler
from alphabet_model import AlphabetModel, Gate
from paged_core import AsyncEngine, ConfigError, Engine, EngineConfig, TextCodec
from paged_torchserve import bodies, metrics
from paged_torchserve.devices import choose_devices
from paged_torchserve.settings import read_settings
from toy_tokenizers import CharacterTokenizer, DeafTokenizer, PartsTokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # it leaves a file open
    from ts.context import Context, RequestProcessor
    from ts.metrics.caching_metric import CachingMetric
    from ts.utils.util import list_classes_from_module


class FakeCache:
    """TorchServe's cache of metrics, that keeps what it is told."""

    def __init__(self) -> None:
        self.told: dict[str, float] = {}
        self.num_updates = 0

    def add_metric_to_cache(self, metric_name: str, **kind: Any) -> Any:
        def add_or_update(value: float, labels: list[str]) -> None:
            assert labels == ["m", "Model"]
            self.num_updates += 1
            adds = metrics.NAMES[metric_name] == "counter"
            self.told[metric_name] = value + (self.told.get(metric_name, 0.0) if adds else 0.0)

        CachingMetric(metric_name=metric_name, **kind)  # it checks what it is given
        return SimpleNamespace(add_or_update=add_or_update)


class Worker:
    """A worker's side of TorchServe: requests come, each step is one call, and those that end are forgotten."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tmp: Path, model: AlphabetModel | None = None, **settings: Any
    ) -> None:
        def open_alphabets(model_dir: Any, devices: Any, found: Any, plugins: Any) -> list[AsyncEngine]:
            engines = [Engine(model or AlphabetModel(), found.engine, plugins=each) for each in plugins]
            return [AsyncEngine(engine, tokenizer=CharacterTokenizer()) for engine in engines]

        monkeypatch.setattr(paged_torchserve.handler, "open_engines", open_alphabets)
        section = {"num_blocks": 128, "attention_backend": "reference", **settings}
        frontend = {name: section.pop(name) for name in ("responseTimeout",) if name in section}
        config = {"continuousBatching": True, **frontend, "paged": section}
        self.cache = FakeCache()
        monkeypatch.setattr("tempfile.tempdir", str(tmp))
        self.context = Context("m", str(tmp / "model"), None, 8, None, "0.12.0", True, self.cache, config)
        self.handler = paged_torchserve.handler.PagedHandler()
        self.handler.initialize(self.context)
        self.engine = self.handler._engines[0].engine
        self.waiting: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
        self.replies: dict[str, Reply] = {}

    def post(self, name: str, parts: dict[str, Any], url_path: str = "", headers: dict[str, str] | None = None) -> None:
        """By /predictions/NAME, or VERSION and ``url_path``."""
        self.send(name, parts, {"Host": "here", **(headers or {}), "explain": "False", "url_path": url_path})

    def send(self, name: str, parts: dict[str, Any], headers: dict[str, str]) -> None:
        """By any of TorchServe's doors: ``headers`` are what tells them apart."""
        about_parts = {part: {"content-type": ""} for part in parts}
        self.waiting[name] = (parts, {**about_parts, **headers})
        self.replies[name] = Reply()

    def leave(self, name: str) -> None:
        del self.waiting[name]

    def step(self) -> None:
        names = list(self.waiting)
        self.context.request_ids = dict(enumerate(names))
        self.context.request_processor = [RequestProcessor(self.waiting[name][1]) for name in names]
        answers = self.handler.handle([self.waiting[name][0] for name in names], self.context)
        assert len(answers) == len(names)
        for index in self.context.request_ids:  # who isn't named in the answer stays as he is
            name = names[index]
            end = self.context.stopping_criteria[index](answers[index])
            status, _ = self.context.get_response_status(index)
            self.replies[name].add(answers[index], end, status, self.context.get_response_content_type(index))
            if end is False:
                self.waiting[name] = ({}, self.waiting[name][1])
            else:
                del self.waiting[name]

    def run(self) -> None:
        deadline = time.monotonic() + 30
        while self.waiting:
            assert time.monotonic() < deadline
            self.step()

    def ask(self, parts: dict[str, Any], url_path: str = "") -> Reply:
        self.post("r", parts, url_path)
        self.run()
        return self.replies["r"]


class Reply:
    def __init__(self) -> None:
        self.messages: list[tuple[bytes, bool | None]] = []
        self.status, self.content_type = 0, ""

    def add(self, body: bytes, end: bool | None, status: int, content_type: str) -> None:
        assert not self.messages or (self.messages[-1][1] is False and end is not None), "it had ended"
        if not self.messages:
            self.status, self.content_type = status, content_type
        self.messages.append((body, end))

    @property
    def text(self) -> str:
        assert self.messages[-1][1] is not False
        return b"".join(body for body, _ in self.messages).decode()

    @property
    def json(self) -> Any:
        assert self.content_type == "application/json"
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        assert self.content_type.startswith("text/event-stream")
        found = [line.removeprefix("data: ") for line in self.text.split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in found]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    made: list[Worker] = []

    def make(model: AlphabetModel | None = None, **settings: Any) -> Worker:
        made.append(Worker(monkeypatch, tmp_path, model, **settings))
        return made[-1]

    yield make
    for each in made:
        each.handler.close()


# ---- what TorchServe asks of a handler -------------------------------------------------------------------------


def test_its_module_defines_one_class_as_torchserve_wants():
    assert list_classes_from_module(paged_torchserve.handler) == [paged_torchserve.handler.PagedHandler]


def test_a_configuration_without_continuous_batching_is_refused(monkeypatch):
    context = Context("m", "/nowhere", None, 8, None, "0.12.0", True, FakeCache(), {})
    with pytest.raises(ValueError, match="continuousBatching: true"):
        paged_torchserve.handler.PagedHandler().initialize(context)


# ---- the shapes of requests ------------------------------------------------------------------------------------

PLAIN = "text/plain; charset=utf-8"
REST = "abcdefghijklmnopqrstuvwxyz{|}~\x7f"  # where the model comes to its end


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


# ---- errors, one request at a time -----------------------------------------------------------------------------


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
    serving.step()
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


# ---- who leaves, and silence -----------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_blocks_within_a_step(worker):
    batches: list[int] = []  # rows in each step
    gate = Gate()
    serving = worker(AlphabetModel(lambda token_ids: (gate(token_ids), batches.append(len(token_ids)))))
    serving.post("gone", {"body": {"prompt": "!", "max_new_tokens": 90}})
    serving.post("stays", {"body": {"prompt": "#", "max_new_tokens": 60}})
    gate.shuts_at = 10
    gate.open()
    serving.step()
    until(lambda: gate.num_steps == 10)
    serving.leave("gone")
    serving.step()
    gate.open()
    serving.run()
    assert batches[10:] == [1] * len(batches[10:]), "not in the step under way, but from the next one on"
    assert len(serving.replies["stays"].text) == 61


def test_the_only_client_that_leaves_is_noticed_by_the_silence(worker):
    steps: list[Any] = []
    serving = worker(slow(0.05, steps), heartbeat_s=0.2)
    serving.post("gone", {"body": {"prompt": "!", "max_new_tokens": 90}})
    serving.step()
    until(lambda: steps and not serving.engine.has_work)
    assert len(steps) < 90
    serving.leave("gone")
    assert serving.ask({"body": {"prompt": "abc", "max_new_tokens": 3}}).text == "abcdef"


def test_a_client_that_was_cut_off_by_silence_is_told(worker):
    steps: list[Any] = []
    serving = worker(slow(0.05, steps), heartbeat_s=0.2)
    serving.post("r", {"body": {"prompt": "!", "stream": True, "max_tokens": 90}}, "v1/completions")
    serving.step()
    until(lambda: steps and not serving.engine.has_work)
    serving.run()
    *_, error, done = serving.replies["r"].events
    assert "cut off" in error["error"]["message"]
    assert done == "[DONE]"


def test_an_engine_that_fails_tells_all_who_wait_and_ends_the_worker(worker, monkeypatch):
    model = AlphabetModel()
    serving = worker(model)
    given_up: list[Any] = []
    desk = serving.handler._desk
    serving.handler._watch._give_up = lambda status: given_up.append((status, desk.is_empty, desk.silence_s > 0.5))

    def broken() -> None:
        raise RuntimeError("out of everything")

    monkeypatch.setattr(serving.engine, "step", broken)
    logging.disable(logging.CRITICAL)
    try:
        reply = serving.ask({"body": {"prompt": "abc", "max_tokens": 3}}, "v1/completions")
        assert reply.status == 503
        until(lambda: given_up == [(1, True, True)])  # the reply has had time to get to TorchServe
    finally:
        logging.disable(logging.NOTSET)


def test_a_step_that_never_ends_is_told_to_all_who_wait_and_ends_the_worker(worker):
    release, held = threading.Event(), threading.Event()

    def hang(token_ids: Any) -> None:
        if len(token_ids) == 2:  # both are beyond their prompts
            held.set()
            release.wait(30)
        elif len(token_ids) == 1:
            time.sleep(0.05)  # the other is on its way

    serving = worker(AlphabetModel(hang), responseTimeout=1)
    given_up: list[int] = []
    serving.handler._watch._give_up = given_up.append
    logging.disable(logging.CRITICAL)
    try:
        serving.post("plain", {"body": {"prompt": "ab!", "max_new_tokens": 90}})
        serving.post("streamed", {"body": {"prompt": "abc", "stream": True}}, "v1/completions")
        serving.step()
        assert held.wait(30)
        serving.run()
        assert "stopped" in json.loads(serving.replies["plain"].text)["error"]
        *_, error, done = serving.replies["streamed"].events
        assert ("stopped" in error["error"]["message"], done) == (True, "[DONE]")
        assert serving.ask({"body": "abc"}).status == 503
        until(lambda: given_up == [1])
    finally:
        release.set()
        logging.disable(logging.NOTSET)


def test_a_watch_goes_on_when_metrics_cant_be_told(worker):
    steps: list[Any] = []
    tried: list[None] = []
    serving = worker(slow(0.05, steps), heartbeat_s=0.2)

    def fails() -> None:
        tried.append(None)
        raise ArithmeticError

    logging.disable(logging.CRITICAL)
    try:
        serving.handler._watch._flush = fails
        until(lambda: len(tried) > 1)
        serving.post("gone", {"body": {"prompt": "!", "max_new_tokens": 90}})
        serving.step()
        until(lambda: steps and not serving.engine.has_work)
        assert len(steps) < 90
    finally:
        logging.disable(logging.NOTSET)


def test_nothing_is_dropped_while_torchserve_is_asking(worker):
    serving = worker(slow(0.01))
    desk = serving.handler._desk
    serving.post("r", {"body": {"prompt": "!", "max_new_tokens": 40}})
    serving.step()
    with desk._in_step:  # as while a call is under way
        assert desk.silence_s == 0.0
        desk.drop_if_silent(-1.0)
    serving.run()
    assert len(serving.replies["r"].text) == 41


# ---- what must never fail the others ---------------------------------------------------------------------------

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


# ---- other doors than plain REST -------------------------------------------------------------------------------


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


# ---- metrics ---------------------------------------------------------------------------------------------------


def test_metrics_are_told_together_and_not_once_a_token(worker):
    serving = worker(max_new_tokens=50)
    serving.handler._watch.close()
    serving.ask({"body": '!"#'})
    serving.handler._watch._flush()
    told = serving.cache.told
    assert told["paged_generation_tokens_total"] == 50
    assert told["paged_prompt_tokens_total"] == 3
    assert told["paged_requests_running"] == 0
    assert told["paged_time_to_first_token_seconds_count"] == 1
    assert told["paged_inter_token_latency_seconds_count"] == 49
    assert told["paged_inter_token_latency_seconds_sum"] > 0
    assert serving.cache.num_updates < 3 * len(metrics.NAMES)
    before = serving.cache.num_updates
    serving.handler._watch._flush()
    assert serving.cache.num_updates == before


def test_several_engines_share_the_requests_and_their_metrics_are_added_up(worker):
    serving = worker(slow(0.02), replicas=2, device="cpu", max_new_tokens=20)
    serving.handler._watch.close()
    names = [chr(ord("A") + number) for number in range(6)]
    for name in names:
        serving.post(name, {"body": name})
    for _ in range(3):
        serving.step()
    running = [sum(each.lane.engine is engine for each in serving.handler._desk._open.values())
               for engine in serving.handler._engines]  # fmt: skip
    assert running == [3, 3]
    serving.run()
    assert [serving.replies[name].text for name in names] == [
        "".join(chr(ord(name) + k) for k in range(21)) for name in names
    ]
    serving.handler._watch._flush()
    assert serving.cache.told["paged_generation_tokens_total"] == 120
    assert serving.cache.told["paged_requests_succeeded_total"] == 6


@pytest.mark.parametrize(
    ("gpu_id", "gpu_ids", "settings", "devices"),
    [
        (None, [], {}, ["cpu"]),
        (None, [], {"replicas": 4}, ["cpu"]),
        (0, [0], {}, ["cuda:0"]),
        (1, [0, 1, 2, 3], {"replicas": 1}, ["cuda:1"]),
        (1, [0, 1, 2, 3], {"replicas": 4}, ["cuda:1", "cuda:2", "cuda:3", "cuda:0"]),
        (0, [0, 1], {"replicas": 8}, ["cuda:0", "cuda:1"]),
        (2, [2, 3], {"device": "cuda:3"}, ["cuda:3"]),
        (2, [2, 3], {"device": "auto"}, ["auto"]),
        (None, [], {"device": "cpu", "replicas": 2}, ["cpu", "cpu"]),
        (0, [0, 1], {"tensor_parallel_size": 2}, ["auto"]),
    ],
)
def test_each_engine_has_a_gpu_of_its_own(gpu_id, gpu_ids, settings, devices):
    assert choose_devices(gpu_id, gpu_ids, read_settings({"paged": settings})) == devices


def test_a_host_of_several_gpus_is_not_taken_for_one_without_a_word():
    with pytest.raises(ConfigError, match=r"there are 4.*replicas=4 for all.*replicas=1 for this one"):
        choose_devices(2, range(4), read_settings({}))
    with pytest.raises(ConfigError, match="leave device out"):
        choose_devices(2, range(4), read_settings({"paged": {"device": "cuda:1", "replicas": 2}}))


def slow(step_s: float, steps: list[Any] | None = None) -> AlphabetModel:
    """``steps`` gets the token ids of each."""

    def step(token_ids: list[int]) -> None:
        if steps is not None:
            steps.append(token_ids)
        time.sleep(step_s)

    return AlphabetModel(step)


def until(condition: Any, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def test_settings_of_an_engine_are_checked_by_name_and_type():
    assert read_settings({"paged": {"max_num_seqs": 4, "watermark": 0}}).engine == EngineConfig(
        max_num_seqs=4, watermark=0.0
    )
    nan = float("nan")
    wrong = [{"max_num_seq": 4}, {"max_num_seqs": "4"}, {"dtype": 16}, [1], {"num_blocks": 0}]
    wrong += [{"max_reply_bytes": 0}, {"heartbeat_s": 0}, {"heartbeat_s": nan}, {"max_new_tokens": 0}]
    for section in wrong:
        with pytest.raises(ConfigError):
            read_settings({"paged": section})


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
def test_a_tokenizer_whose_vocabulary_cant_be_read_costs_requests_with_grammars_only(worker, monkeypatch, kind):
    def choking(self, token):
        raise kind

    monkeypatch.setattr(TextCodec, "token_bytes", choking)
    served = worker()
    served.post("bad", {"data": "A", "grammar": {"type": "regex", "value": "B+"}})
    served.post("good", {"data": "A"})
    served.run()
    assert '"error":"the server failed' in served.replies["bad"].text
    assert served.replies["good"].status == 200
