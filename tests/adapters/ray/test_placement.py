"""Where requests go, and how prompts are told: no Ray is needed to decide."""

from __future__ import annotations

import random

import pytest

from paged_core import (
    ConfigError,
    Engine,
    EngineConfig,
    SamplingParams,
)
from paged_ray.digests import DigestLog, chain
from paged_ray.exposition import merged
from paged_ray.placement import CacheChanges, Placement
from paged_ray.settings import from_mapping, settings
from tiny_model import TinyModel

KEY = b"k" * 32


def placement(*names: str, **options) -> Placement:
    found = Placement(16, **options)
    found.update(names)
    return found


def test_a_request_goes_where_its_beginning_is():
    known = placement("a", "b", "c")
    known.take_in("b", CacheChanges(2, [11, 12], []))
    known.take_in("c", CacheChanges(1, [11], []))
    assert known.rank([11, 12, 13], 60) == ["b", "c", "a"]
    assert known.best([11, 12, 13], 60) == "b"
    assert known.num_cached("b", [11, 12, 13]) == 2
    assert known.num_cached("b", [99, 11]) == 0, "a block counts after those before it only"


def test_what_was_sent_is_known_at_once_and_forgotten_if_reports_dont_bear_it_out():
    known = placement("a", "b")
    known.sent("r", "a", [1, 2], 40)
    known.ended("r")
    assert known.best([1, 2], 40) == "a"
    known.take_in("a", CacheChanges(1, [], []))  # it was computing them when it told
    assert known.num_cached("a", [1, 2]) == 2
    known.take_in("a", CacheChanges(1, [], []))
    assert known.num_cached("a", [1, 2]) == 0


def test_a_long_queue_outweighs_a_short_beginning():
    known = placement("a", "b", open_cost=10)
    known.take_in("a", CacheChanges(1, [1], []))
    known.sent("busy", "a", [7, 8, 9], 100)
    assert known.best([1], 20) == "b", "16 tokens saved, 100 to wait for"
    known.begun("busy")
    assert known.best([1], 20) == "a", "10 for an open request"
    known.ended("busy")
    known.ended("busy")
    assert known.best([1], 20) == "a"


def test_equals_take_turns():
    known = placement("a", "b", "c")
    assert {known.best([], 10) for _ in range(3)} == {"a", "b", "c"}
    assert {known.rank([], 10)[0] for _ in range(3)} == {"a", "b", "c"}


def test_evicted_blocks_replaced_wholes_and_gone_replicas_are_forgotten():
    known = placement("a", "b")
    known.take_in("a", CacheChanges(3, [1, 2], []))
    known.take_in("a", CacheChanges(4, [], [2]))
    assert known.num_cached("a", [1, 2]) == 1
    known.take_in("a", CacheChanges(9, [5], [], whole=True))
    assert (known.num_cached("a", [1]), known.num_cached("a", [5])) == (0, 1)
    known.sent("r", "a", [6], 20)
    known.update(["b", "c"])
    known.ended("r")
    assert known.num_cached("c", [5]) == 0 and known.best([5, 6], 40) in ("b", "c")
    assert dict(known.cursors()) == {"b": 0, "c": 0}


def test_ranking_agrees_with_costs_worked_out_one_by_one():
    rng, known = random.Random(1), placement(*"abcd", open_cost=7)
    held = {name: set() for name in "abcd"}
    for number in range(200):
        name, digests = rng.choice("abcd"), [rng.randrange(4) * 100 + i for i in range(rng.randrange(5))]
        known.take_in(name, CacheChanges(number, digests, []))
        held[name] |= set(digests)
        asked = [rng.randrange(4) * 100 + i for i in range(4)]
        depth = {n: next((i for i, d in enumerate(asked) if d not in held[n]), 4) for n in held}
        ranked = known.rank(asked, 70)
        assert [depth[n] for n in ranked] == sorted(depth.values(), reverse=True)
        assert depth[known.best(asked, 70)] == max(depth.values())


# ---- digests -------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine_and_log() -> tuple[Engine, DigestLog]:
    log = DigestLog(KEY)
    config = EngineConfig(num_blocks=12, block_size=4, attention_backend="reference")
    return Engine(TinyModel(), config, plugins=[log]), log


def answer(engine: Engine, name: str, prompt: list[int], salt: str | None = None) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, cache_salt=salt)
    engine.add_request(name, prompt, params)
    while engine.has_work:
        engine.step()


def test_a_prompts_digests_are_those_that_its_blocks_are_reported_by(engine_and_log):
    engine, log = engine_and_log
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    answer(engine, "r", prompt)
    answer(engine, "s", prompt, salt="tenant")
    told = log.since(0)
    assert told.whole
    assert set(told.stored) == {*chain(KEY, prompt, None, 4), *chain(KEY, prompt, "tenant", 4)}
    assert len(set(told.stored)) == 4, "salts keep them apart"
    assert not set(chain(b"x" * 32, prompt, None, 4)) & set(told.stored), "who lacks the key can't make them"


def test_changes_are_told_once_and_evictions_among_them(engine_and_log):
    engine, log = engine_and_log
    answer(engine, "first", [1] * 9)
    last = log.since(0).last
    assert log.since(last) == CacheChanges(last, [], [])
    for number in range(8):
        answer(engine, str(number), [10 + number] * 9)
    told = log.since(last)
    assert not told.whole and set(told.removed) >= set(chain(KEY, [1] * 9, None, 4))
    engine.release_memory()
    assert log.since(0).stored == []


def test_a_prompts_last_token_is_never_in_its_digests():
    assert len(chain(KEY, [1] * 8, None, 4)) == 1
    assert len(chain(KEY, [1] * 9, None, 4)) == 2


# ---- settings and metrics ------------------------------------------------------------------------------------------


def test_settings_come_from_keywords_files_and_command_lines():
    told = settings("m", replicas=2, max_num_seqs=8, max_stop=3, names=["a"])
    assert (told.engine.max_num_seqs, told.limits.max_stop, told.served_names) == (8, 3, ("a",))
    said = from_mapping({"model": "m", "replicas": "2", "cpus_per_replica": "0.5", "enable_prefix_caching": "false"})
    assert (said.replicas, said.cpus_per_replica, said.engine.enable_prefix_caching) == (2, 0.5, False)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({}, "name no model"),
        ({"model": "m", "replica": 2}, "no setting called 'replica'"),
        ({"model": "m", "replicas": 0}, "at least 1"),
        ({"model": "m", "routing": "best"}, "prefix or load"),
        ({"model": "m", "target_requests": 0}, "above 0"),
    ],
)
def test_settings_that_cant_be_are_refused(args, told):
    with pytest.raises(ConfigError, match=told):
        from_mapping(args)


def test_pages_of_metrics_become_one_with_each_family_told_once():
    page = '# HELP a_total what\n# TYPE a_total counter\na_total{{replica="{0}"}} {1}\n# HELP b it\n# TYPE b gauge\nb{{replica="{0}"}} 1.0\n'  # noqa: E501
    text = merged([page.format("x", 1).encode(), page.format("y", 2).encode()]).decode()
    assert text.splitlines() == [
        "# HELP a_total what", "# TYPE a_total counter", 'a_total{replica="x"} 1', 'a_total{replica="y"} 2',
        "# HELP b it", "# TYPE b gauge", 'b{replica="x"} 1.0', 'b{replica="y"} 1.0',
    ]  # fmt: skip
