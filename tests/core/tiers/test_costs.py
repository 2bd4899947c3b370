"""Whether to load or to compute: what took less lately."""

from __future__ import annotations

from paged_core.tiers import costs
from paged_core.tiers.costs import Costs

BLOCK_BYTES = 1000


def loaded(measured, num_blocks, num_tokens, busy_s, seconds):
    measured.brought(num_blocks, busy_s)
    measured.waited(seconds, seconds - busy_s, num_tokens)


def test_what_nobody_has_measured_is_tried():
    assert Costs([], BLOCK_BYTES).pays(1, 8, False)


def test_a_quick_disk_is_read_and_a_slow_one_is_not(monkeypatch):
    monkeypatch.setattr(costs.time, "monotonic", lambda: 100.0)
    for busy_s, pays in ((0.001, True), (1.0, False)):
        measured = Costs([], BLOCK_BYTES)
        measured.computed(100, 0.1)  # 1 ms a token
        loaded(measured, 10, 80, busy_s, busy_s)
        assert measured.pays(10, 80, False) is pays


def test_a_short_prefix_is_computed_where_loading_means_to_wait_for_a_step(monkeypatch):
    monkeypatch.setattr(costs.time, "monotonic", lambda: 100.0)
    measured = Costs([], BLOCK_BYTES)
    measured.computed(100, 0.1)
    loaded(measured, 10, 80, 0.001, 0.05)  # read in a moment, and landed 50 ms later
    measured._retry_at = 200.0
    assert not measured.pays(1, 8, False)
    assert measured.pays(100, 800, False)


def test_a_tier_that_was_too_slow_is_tried_again_ever_more_rarely(monkeypatch):
    now = 100.0
    monkeypatch.setattr(costs.time, "monotonic", lambda: now)
    measured = Costs([], BLOCK_BYTES)
    measured.computed(100, 0.1)
    gaps, last = [], now
    loaded(measured, 10, 80, 1.0, 1.0)
    while len(gaps) < 9:
        now += 0.25
        if measured.pays(10, 80, False):
            assert not measured.pays(10, 80, False), "one tries, and the others wait for what comes of it"
            gaps.append(now - last)
            last = now
            loaded(measured, 10, 80, 1.0, 1.0)
    assert gaps == sorted(gaps)
    assert gaps[0] < 3
    assert gaps[-1] >= 60
    loaded(measured, 10, 80, 0.0001, 0.0001)
    for _ in range(30):
        loaded(measured, 10, 80, 0.0001, 0.0001)
    assert all(measured.pays(10, 80, False) for _ in range(3)), "it has become quick"


def test_a_load_may_take_as_long_as_computing():
    measured = Costs([], BLOCK_BYTES)
    assert measured.patience_s(1000) > 5
    measured.computed(100, 0.1)
    assert 1.0 <= measured.patience_s(1000) < 1.2
