"""Episode: one engine, and the operations on it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import torch

from fuzz.alone import Alone
from fuzz.asks import draw_ask
from fuzz.held import NUM_RUDE_WAYS, Patient, Rude
from fuzz.model import FuzzModel
from fuzz.parts import Parts, count_on_luck, spoil
from fuzz.rows import MOMENT, NAN, Judge, Row
from fuzz.settings import draw_kind, draw_setting
from paged_core import Engine, EngineDeadError, FinishReason, InvalidRequestError, SamplingParams
from paged_core.scheduling.block_pool import NULL_BLOCK
from paged_core.scheduling.request import Request

CHAPTER = 50  # episodes with the same model and prompts, so that answers are computed once
_CROWD = 12  # open requests; above this number no more are added
_PATIENCE = 3000  # steps within which everything must have ended


class Episode:
    """Episode ``number`` of ``seed``. ``counts``: how often each thing has happened."""

    def __init__(self, seed: int, number: int, alone: Alone, counts: Counter[str]) -> None:
        self._name, self._chapter = f"{seed}.{number}", f"{seed}.chapter.{number // CHAPTER}"
        self._alone, self._counts = alone, counts
        setting = draw_setting(draw_kind(random.Random(self._chapter)), random.Random(self._name))
        self._kind, self._config = setting.kind, setting.config
        tier = random.Random(f"{self._name}.tier") if setting.tier else None
        self._model, self._parts = FuzzModel(setting.kind), Parts(tier)
        self._engine = Engine(self._model, setting.config, plugins=[self._parts])
        if tier is not None:
            count_on_luck(self._engine._offloading._costs, tier)
        self._judge = Judge(alone, setting.kind)
        self._rows: dict[object, Row] = {}  # rows that have not ended
        self._owners: dict[str, list[Request]] = {}  # all rows, by salt
        self._beam_steps: dict[str, list[list[int]]] = {}  # the earlier tokens of rows that now continue other rows
        self._looked_at: set[tuple[object, int]] = set()
        self._told: list[list[int]] = []
        self._num_asked = 0
        self.place: int | None = None  # of the current operation; None: the episode is ending

    def __str__(self) -> str:
        return f"episode {self._name}: {self._kind}, {self._config}"

    # ---- operations ----------------------------------------------------------------------------------------------

    def run(self, places: Iterable[int]) -> None:
        """Run the operations ``places``, then step until all requests have ended."""
        for place in places:
            rnd = random.Random(f"{self._name}.{place}")
            (operation,) = rnd.choices(list(_OPERATIONS), list(_OPERATIONS.values()))
            self.place = place
            operation(self, rnd)
            self._counts["operations"] += 1
            self._engine.check()
        self.place = None
        self._end(random.Random(f"{self._name}.end"))

    def _arrive(self, rnd: random.Random) -> None:
        ask = draw_ask(rnd, self._chapter, self._told)
        if len(self._rows) >= _CROWD:
            self._step(rnd)
            return
        self._num_asked += 1
        try:
            requests = self._engine.add_request(str(self._num_asked), ask.prompt, ask.params())
        except InvalidRequestError:
            self._counts["refused"] += 1
            return
        self._take_in([Row(request, ask, self._model.weights) for request in requests])

    def _arrive_as_group(self, rnd: random.Random) -> None:
        if len(self._rows) >= _CROWD:
            return
        start, same = rnd.randrange(80), rnd.random() < 0.5
        lengths = [rnd.randrange(1, 12)] * 2 if same else [rnd.randrange(1, 12) for _ in range(rnd.choice((2, 3)))]
        prompts = [list(range(start, start + length)) for length in lengths]
        params = SamplingParams(max_tokens=rnd.randrange(1, 9), cache_salt=rnd.choice((None, "a")))
        next_token = self._alone.model(self._kind, self._model.weights).next_token
        self._num_asked += 1
        try:
            requests = self._engine.add_group(str(self._num_asked), prompts, params, selector=Patient(next_token))
        except InvalidRequestError:
            self._counts["refused"] += 1
            return
        self._take_in([Row(request, None, self._model.weights) for request in requests])

    def _arrive_rudely(self, rnd: random.Random) -> None:
        if len(self._rows) >= _CROWD:
            return
        self._num_asked += 1
        params = SamplingParams(max_tokens=9, ignore_eos=True)
        selector = Rude(rnd.randrange(NUM_RUDE_WAYS))
        try:
            requests = self._engine.add_request(str(self._num_asked), [1, 2, 3], params, selector=selector)
        except InvalidRequestError:
            self._counts["refused"] += 1
            return
        self._take_in([Row(request, None, self._model.weights, rude=True) for request in requests])
        self._counts["faults: a selector answers nonsense"] += 1

    def _take_in(self, rows: list[Row]) -> None:
        self._counts["requests"] += 1
        self._counts["rows"] += len(rows)
        for row in rows:
            self._rows[row.request] = row
            self._owners.setdefault(_salt(row.request), []).append(row.request)

    def _step(self, rnd: random.Random) -> None:
        self._counts["steps"] += 1
        self._take(self._engine.step())
        for request in self._engine._scheduler.running:
            self._check_hits(request)
            if request.group.lockstep:
                self._beam_steps.setdefault(_salt(request), []).append(list(request.tokens))

    def _cancel(self, rnd: random.Random) -> None:
        if self._rows:
            id = rnd.choice(list(self._rows.values())).request.id
            for row in self._rows.values():
                row.cancelled |= row.request.id == id
            self._engine.abort(id)
            self._counts["cancels"] += 1

    def _stop(self, rnd: random.Random) -> None:
        rows = [row for row in self._rows.values() if not (row.ask and row.ask.beams)]  # beams have no stop strings
        if rows:
            row = rnd.choice(rows)
            row.stopped = True
            output = self._engine.stop(row.request)
            self._take([output] if output else [])
            self._counts["stops"] += 1

    def _answer(self, rnd: random.Random) -> None:
        held = list(dict.fromkeys(request.group for request in self._rows if request.held and not request.finished))
        if not held:
            return
        rows = [request for request in rnd.choice(held).members if not request.finished]
        assert all(request.held for request in rows), "a group is held whole or not at all"
        if rnd.random() < 0.2:
            self._engine.recompute(rows)
            return
        for request in rows:
            self._rows[request].stopped = True
        self._take(rows[0].selector.answer(self._engine, rows, rnd))
        self._counts["answers of held groups"] += 1

    def _preempt_held(self, rnd: random.Random) -> None:
        self._engine.preempt_held()

    def _look(self, rnd: random.Random) -> None:
        """Check that a row's K/V in the cache are those of its tokens."""
        self._engine.view()
        running = [request for request in self._engine._scheduler.running if request.num_computed]
        if not running:
            return
        request = rnd.choice(running)
        size, num = self._config.block_size, request.num_computed
        truth = self._alone.model(self._kind, self._model.weights).keys_and_values(request.tokens[:num])
        there = torch.tensor([request.block_table[i // size] != NULL_BLOCK for i in range(num)])
        for found, expected in zip(self._engine.read_kv(request), truth, strict=bool(truth)):
            for mine, theirs in zip(found, expected, strict=True):
                near = torch.isclose(mine.double(), theirs, atol=1e-5, rtol=1e-5, equal_nan=True)
                near |= mine.isnan() & self._judge.nan_seen  # the row will end because of this NaN
                assert near[:, there].all(), f"wrong K/V of {request}"
        self._counts["K/V compared"] += 1

    def _spoil(self, rnd: random.Random) -> None:
        """Write NaN into every block that no request holds."""
        view, cache = self._engine.view(), self._engine._runner.cache
        kept = {i + 1 for i, count in enumerate(view.references) if count} | set(view.cached)
        spoil(cache, [block for block in range(1, cache.num_blocks + 1) if block not in kept])

    # ---- faults --------------------------------------------------------------------------------------------------

    def _raise_for_a_moment(self, rnd: random.Random) -> None:
        self._model.num_raising = rnd.randrange(1, 4)
        self._judge.excuses[MOMENT] += self._model.num_raising
        self._counts["faults: forward raises"] += self._model.num_raising

    def _nan_for_a_moment(self, rnd: random.Random) -> None:
        self._model.num_nan = 1
        self._judge.excuses[NAN] += 1
        self._judge.nan_seen = True
        self._counts["faults: logits are NaN"] += 1

    def _nan_in_the_cache(self, rnd: random.Random) -> None:
        self._model.num_nan_kv = 1
        self._judge.excuses[NAN] += 1
        self._judge.nan_seen = True
        self._counts["faults: K/V are NaN"] += 1

    def _lack_memory(self, rnd: random.Random) -> None:
        self._model.room = rnd.choice((None, 1, 2, 3, 7))
        self._counts["faults: no memory for a step"] += self._model.room is not None

    def _lack_memory_to_choose(self, rnd: random.Random) -> None:
        self._parts.sampler.room = rnd.choice((None, 1, 2))
        self._counts["faults: no memory to choose"] += self._parts.sampler.room is not None

    def _let_all_end(self, rnd: random.Random) -> None:
        self._model.room = None
        self._drain(rnd)

    def _save(self, rnd: random.Random) -> None:
        self._counts["blocks saved"] += self._engine.save_prefix_cache(60.0)

    def _tier_is_full(self, rnd: random.Random) -> None:
        if self._parts.tier is not None:
            self._parts.tier.wants_more = not self._parts.tier.wants_more

    def _change_weights(self, rnd: random.Random) -> None:
        if not self._rows:
            self._model.use_weights(1 - self._model.weights)
            self._owners.clear()
            self._beam_steps.clear()
            self._counts["weights changed"] += 1

    def _release_memory(self, rnd: random.Random) -> None:
        self._counts["memory given back"] += self._engine.release_memory()

    # ---- the end -------------------------------------------------------------------------------------------------

    def _end(self, rnd: random.Random) -> None:
        way = rnd.random()
        self._model.room = None
        if way < 0.05:
            self._die(rnd)
        elif way < 0.1:
            for row in self._rows.values():
                row.cancelled = True
            self._engine.close()
        self._drain(rnd)
        memory = self._engine.memory
        assert (memory.num_blocks_used, memory.num_blocks) == (0, self._config.num_blocks), "blocks are lost"
        assert not self._rows, f"never ended: {list(self._rows)}"
        assert self._engine.num_open == 0
        stats = self._engine.last_stats
        if stats is None:  # no step was computed
            return
        self._counts["preemptions"] += stats.total_preemptions
        self._counts["prefix hits, tokens"] += stats.total_prefix_hits
        self._counts["tokens loaded"] += stats.offloading.total_tokens_loaded
        self._counts["loads"] += stats.offloading.total_loads
        self._counts["loads abandoned"] += stats.offloading.total_loads_abandoned

    def _drain(self, rnd: random.Random) -> None:
        for _ in range(_PATIENCE):
            while any(request.held and not request.finished for request in self._rows):
                self._answer(rnd)
            if not self._engine.has_work:
                return
            self._step(rnd)
            self._engine.check()
        raise AssertionError(f"{_PATIENCE} steps, and these have not ended: {list(self._rows)}")

    def _die(self, rnd: random.Random) -> None:
        self._model.room = 0
        for row in self._rows.values():
            row.cancelled = True
        try:
            self._drain(rnd)
        except EngineDeadError:
            self._counts["faults: no memory for a token"] += 1
            self._engine.close()
            self._take(self._engine.step())
            self._check_dead()

    def _check_dead(self) -> None:
        try:
            self._engine.add_request("late", [1])
        except EngineDeadError:
            return
        raise AssertionError("an engine that has failed took a request")

    # ---- results -----------------------------------------------------------------------------------------------------

    def _take(self, outputs) -> None:
        for output in outputs:
            row = self._rows.get(output.request)
            assert row is not None, f"news of {output.request}, which had ended"
            row.collected.take(output)
            if output.finish_reason is not None:
                del self._rows[output.request]
                self._judge.end(row, output)
                self._counts[f"ended: {output.finish_reason}"] += 1
                if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                    self._told.append(list(output.request.tokens))

    def _check_hits(self, request) -> None:
        """Check that blocks found in the cache were computed from the same tokens, under the same salt."""
        key = (request, request.num_recomputed_to)
        if not request.num_cached or key in self._looked_at:
            return
        self._looked_at.add(key)
        start = request.tokens[: request.num_cached]
        others = [row.tokens for row in self._owners.get(_salt(request), ()) if row is not request]
        mine = [request.tokens] if request.num_recomputed_to else []
        known = (*others, *self._beam_steps.get(_salt(request), ()), *mine)
        assert any(tokens[: len(start)] == start for tokens in known), f"{request} found blocks of another salt"


def _salt(request: Request) -> str:
    return request.params.cache_salt or ""


_OPERATIONS = {  # operations, and their frequencies
    Episode._step: 45,
    Episode._arrive: 30,
    Episode._answer: 5,
    Episode._cancel: 4,
    Episode._stop: 3,
    Episode._look: 2,
    Episode._spoil: 3,
    Episode._arrive_as_group: 3,
    Episode._preempt_held: 1,
    Episode._raise_for_a_moment: 1,
    Episode._nan_for_a_moment: 1,
    Episode._nan_in_the_cache: 1,
    Episode._arrive_rudely: 1,
    Episode._lack_memory: 2,
    Episode._lack_memory_to_choose: 2,
    Episode._change_weights: 3,
    Episode._release_memory: 2,
    Episode._let_all_end: 1,
    Episode._save: 1,
    Episode._tier_is_full: 1,
}
