"""Whether to load or to compute: what took less lately."""

from __future__ import annotations

from paged_core.tiers import costs
from paged_core.tiers.costs import TierCosts
from paged_core.tiers.stats import TierStats

BLOCK_BYTES = 1000


def loaded(measured, num_blocks, num_tokens, busy_s, seconds):
    measured.brought(num_blocks, busy_s)
    measured.waited(seconds, seconds - busy_s, num_tokens)


def test_what_nobody_has_measured_is_tried():
    assert TierCosts([], BLOCK_BYTES, 8).pays(1, 8, False)


def test_a_quick_disk_is_read_and_a_slow_one_is_not(monkeypatch):
    monkeypatch.setattr(costs.time, "monotonic", lambda: 100.0)
    for busy_s, pays in ((0.001, True), (1.0, False)):
        measured = TierCosts([], BLOCK_BYTES, 8)
        measured.computed(100, 0.1)  # 1 ms a token
        loaded(measured, 10, 80, busy_s, busy_s)
        assert measured.pays(10, 80, False) is pays


def test_a_short_prefix_is_computed_where_loading_means_to_wait_for_a_step(monkeypatch):
    monkeypatch.setattr(costs.time, "monotonic", lambda: 100.0)
    measured = TierCosts([], BLOCK_BYTES, 8)
    measured.computed(100, 0.1)
    loaded(measured, 10, 80, 0.001, 0.05)  # read in a moment, and landed 50 ms later
    measured._retry_at = 200.0
    assert not measured.pays(1, 8, False)
    assert measured.pays(100, 800, False)


def test_a_tier_that_was_too_slow_is_tried_again_ever_more_rarely(monkeypatch):
    now = 100.0
    monkeypatch.setattr(costs.time, "monotonic", lambda: now)
    measured = TierCosts([], BLOCK_BYTES, 8)
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
    measured = TierCosts([], BLOCK_BYTES, 8)
    assert measured.patience_s(1000) > 5
    measured.computed(100, 0.1)
    assert 1.0 <= measured.patience_s(1000) < 1.2


def known(tokens_per_s=1000.0, bytes_per_s=125_000.0):
    """As quick as computing, if nothing else is said: a block of eight tokens takes 8 ms either way."""
    measured = TierCosts([], BLOCK_BYTES, 8)
    measured.tokens_per_s, measured.bytes_per_s = tokens_per_s, bytes_per_s
    measured._retry_at = float("inf")
    return measured


def test_head_and_tail_meet_where_both_have_taken_as_long():
    assert known().num_to_compute(100, 800) == 400
    assert known(bytes_per_s=3 * 125_000).num_to_compute(100, 800) == 200
    assert known(bytes_per_s=1.0).num_to_compute(100, 800) == 799
    assert known(bytes_per_s=None).num_to_compute(100, 800) == 800
    assert known(tokens_per_s=None).num_to_compute(100, 800) == 800


def test_both_are_done_where_that_is_much_quicker_than_loading_all():
    assert known().pays_beside(100, 800)
    assert known(bytes_per_s=12_500).pays_beside(100, 800)
    assert not known(bytes_per_s=8 * 125_000).pays_beside(100, 800)
    assert not known(bytes_per_s=None).pays_beside(100, 800)
    assert not known(tokens_per_s=None).pays_beside(100, 800)


def test_what_a_load_waits_for_anyway_is_not_saved_by_computing():
    waits = known()
    waits.latency_s = 10.0
    assert not waits.pays_beside(100, 800)
    assert waits.num_to_compute(100, 800) == 400


def test_a_disk_that_is_slower_than_computing_helps_who_computes_beside_it_up_to_a_point():
    for times_as_slow, alone, beside in ((0.5, True, True), (3, False, True), (20, False, False)):
        measured = known(bytes_per_s=125_000 / times_as_slow)
        assert measured.pays(100, 800, False) is alone
        assert measured.pays(100, 800, True) is beside


def test_a_small_step_tells_less_of_what_computing_takes():
    for num_tokens, nearer in ((16, False), (512, True)):
        measured = known()
        measured.computed(num_tokens, num_tokens / 100.0)
        assert (measured.tokens_per_s < 800) is nearer


def test_a_load_of_no_use_is_not_tried_again_at_once(monkeypatch):
    now = 100.0
    monkeypatch.setattr(costs.time, "monotonic", lambda: now)
    measured = known(bytes_per_s=1.0)
    measured.failed()
    assert not measured.pays(100, 800, True)
    now += 1.5
    assert measured.pays(100, 800, True)


def test_a_load_before_anything_was_computed_is_not_held_against_the_tier(monkeypatch):
    monkeypatch.setattr(costs.time, "monotonic", lambda: 100.0)
    measured = known(tokens_per_s=None, bytes_per_s=1.0)
    measured._retry_at = 0.0
    measured.waited(50.0, 0.0, 80)
    measured.tokens_per_s = 1000.0
    assert measured.pays(100, 800, False), "it is tried once more"


def test_a_tier_that_has_been_of_use_is_forgiven(monkeypatch):
    now = 100.0
    monkeypatch.setattr(costs.time, "monotonic", lambda: now)
    measured = known(bytes_per_s=1.0)
    for _ in range(6):
        measured.failed()
    measured.waited(0.01, 0.0, 800)
    measured.failed()
    now += 1.5
    assert measured.pays(100, 800, False)


class Willing:
    wants_more = True
    stats = TierStats("willing")

    def wrote(self, num_blocks, seconds):
        self.stats = TierStats("willing", seconds_out=seconds, blocks_out=num_blocks)


def test_what_the_cache_evicts_is_not_written_to_a_tier_that_is_slower_than_computing():
    measured = TierCosts([Willing()], BLOCK_BYTES, 8)
    measured.stepped(1000)
    assert measured.wants_more and measured.wants_back
    measured.computed(1000, 1.0)
    measured.brought(10, 10 * 0.0079)
    assert measured.wants_more and measured.wants_back
    for _ in range(20):
        measured.brought(10, 10 * 0.0081)
    assert not measured.wants_more and not measured.wants_back
    for _ in range(20):
        measured.brought(10, 0.01)
    assert measured.wants_more and measured.wants_back, "it has become quick"
    measured._tiers[0].wants_more = False
    assert not measured.wants_more and not measured.wants_back


def test_writing_takes_a_hundredth_of_the_time_of_steps_until_loads_have_paid_for_more():
    tier = Willing()
    measured = TierCosts([tier], BLOCK_BYTES, 8)
    assert measured.wants_more, "a little may be written before there were steps"
    tier.wrote(1, 0.02)
    assert not measured.wants_more
    measured.stepped(1.0)
    assert measured.wants_more
    measured.copied(5, 0.004)  # within steps
    assert measured.wants_more
    tier.wrote(5, 0.027)  # by its own thread
    assert not measured.wants_more
    measured.computed(1000, 1.0)
    measured.saved(100, 0.08)  # 20 ms less than computing
    assert measured.wants_more
    tier.wrote(10, 0.047)
    assert not measured.wants_more, "what was saved is spent"
    measured.saved(100, 7.0)
    assert not measured.wants_more, "a slow load saves nothing"


def test_what_is_sure_to_be_asked_for_again_is_written_where_writing_and_loading_are_quicker_than_computing():
    tier = Willing()
    measured = TierCosts([tier], BLOCK_BYTES, 8)
    assert measured.wants_back, "nobody has measured it"
    measured.computed(1000, 1.0)  # a block in 8 ms
    measured.copied(2, 0.004)
    tier.wrote(10, 0.03)
    assert measured.wants_back and not measured.wants_more
    measured.brought(10, 0.029)
    assert measured.wants_back
    for _ in range(30):
        measured.brought(10, 0.031)
    assert not measured.wants_back
