"""Clients that leave, silence, engines that fail: what becomes of those who wait, and of the worker."""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Any

from alphabet_model import AlphabetModel, Gate
from torchserve_worker import slow
from waiting import until


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
    desk = serving.desk
    serving.give_up_by(lambda status: given_up.append((status, desk.is_empty, desk.silence_s > 0.5)))

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
    serving.give_up_by(given_up.append)
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
        serving.watch._flush = fails
        until(lambda: len(tried) > 1)
        serving.post("gone", {"body": {"prompt": "!", "max_new_tokens": 90}})
        serving.step()
        until(lambda: steps and not serving.engine.has_work)
        assert len(steps) < 90
    finally:
        logging.disable(logging.NOTSET)


def test_nothing_is_dropped_while_torchserve_is_asking(worker):
    serving = worker(slow(0.01))
    desk = serving.desk
    serving.post("r", {"body": {"prompt": "!", "max_new_tokens": 40}})
    serving.step()
    with desk._in_step:  # as while a call is under way
        assert desk.silence_s == 0.0
        desk.drop_if_silent(-1.0)
    serving.run()
    assert len(serving.replies["r"].text) == 41
