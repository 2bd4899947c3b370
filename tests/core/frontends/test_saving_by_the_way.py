"""A server without work gives its tiers what they lack: whoever kills it (TorchServe always does) loses little."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from paged_core import AsyncEngine, Engine, SamplingParams
from paged_core.engine import offloading
from paged_core.frontends import open_streams
from paged_core.tiers import disk
from tier_engines import SMALL, answers, on_disk, stats
from tiny_model import ChangingModel, TinyModel
from toy_tokenizers import CharacterTokenizer
from waiting import until

PROMPT = list(range(40, 76))


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(open_streams, "_SAVE_AFTER_S", 0.0)


def asked(engine):
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    return engine.submit(PROMPT, params).result(60)


def test_what_a_server_has_computed_is_on_disk_though_nobody_closes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(offloading, "_PACKED_BYTES", 1)  # a block at a time
    engine = AsyncEngine(on_disk(tmp_path), tokenizer=CharacterTokenizer())
    asked(engine)
    until(lambda: engine.look(stats_now).result().blocks_out >= 8)
    other = on_disk(tmp_path)
    answers(other, [PROMPT])
    assert stats(other).total_tokens_loaded >= 32
    other.close()
    assert asked(engine).outputs[0].token_ids, "it serves on"
    engine.close()


def test_a_server_without_a_tier_waits_for_ever(monkeypatch):
    engine = AsyncEngine(Engine(TinyModel(), SMALL), tokenizer=CharacterTokenizer())
    asked(engine)
    until(lambda: engine._streams.idle_s is None)
    engine.close()


def saved(engine):
    """How many parts it takes until nothing is left."""
    num = 0
    while engine.save_some():
        num += 1
        assert num < 1000, "it would never end"
    return num


def test_what_a_folder_has_no_room_for_is_not_written_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(offloading, "_PACKED_BYTES", 1)
    engine = Engine(TinyModel(), replace(SMALL, kv_disk_path=str(tmp_path), kv_disk_bytes=40_000))
    answers(engine, [[i] * 30 for i in range(5)], max_tokens=1)
    assert saved(engine) > 20
    written = stats_now(engine).blocks_out
    assert written > stats_now(engine).num_blocks, "some had to make room for others"
    assert saved(engine) == 0
    engine.save_some()
    assert stats_now(engine).blocks_out == written
    engine.close(0.0)


def stats_now(engine):
    engine._offloading._flush(time.monotonic() + 60)
    return engine.view().offloading.tiers[0]


def test_another_models_blocks_are_saved_anew(tmp_path):
    model = ChangingModel()
    engine = Engine(model, replace(SMALL, kv_disk_path=str(tmp_path)))
    answers(engine, [[7] * 30], max_tokens=1)
    saved(engine)
    model.changed = True
    engine.refresh()
    answers(engine, [[7] * 30], max_tokens=1)
    saved(engine)
    assert stats_now(engine).num_blocks == 7
    engine.close()


def test_a_slow_disk_is_not_waited_for(tmp_path, monkeypatch):
    engine = on_disk(tmp_path)
    answers(engine, [[7] * 30], max_tokens=1)
    monkeypatch.setattr(disk.DiskTier, "flush", lambda self, timeout_s: False)
    assert engine.save_some(), "later"
    monkeypatch.undo()
    assert stats_now(engine).blocks_out == 0
    saved(engine)
    assert stats_now(engine).blocks_out == 7
    engine.close()
