"""Stock's generate() with our decoding loops in it: each call takes the best tier that answers it as stock does.

Stock merges, validates and prepares everything, then calls ``type(self)._sample`` (or ``_beam_search``, ...). Here
``self`` is the user's model under a class of ours, whose loops choose a tier:

=======  ================================================================================================
native   the engine runs the rows: free.py for plain greedy search, else stock's loop over lockstep.py
cache    stock's loop calls the model itself, over a Cache that keeps K/V in blocks (cache.py)
stock    stock's loop as it is
=======  ================================================================================================
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import Cache, MaxLengthCriteria

from paged_core import ConfigError, InvalidRequestError, UnsupportedModel
from paged_hf import upstream
from paged_hf.cache.paged_cache import PagedCache
from paged_hf.generate import free, lockstep, tiers, views
from paged_hf.generate.calls import NotStarted
from paged_hf.generate.host import EngineHost
from paged_hf.generate.report import Report, Tier, note, warn_once
from paged_hf.model.intercepted import compiled_part
from paged_hf.model.reach import Reach
from paged_hf.model.watch import Watch

_LOOP_ARGUMENTS = ("synced_gpus", "streamer", "tokenizer", "assistant_tokenizer")


class Ways(Protocol):
    """How a patched model answers."""

    def run(self, run: Run) -> Any:
        """Answer a call of stock's decoding loop."""


class Tiers:
    """The ways in which one patched model can answer. ``dropped``: tier -> why it isn't used. ``refused``: those of
    them that only the model as it was stood in the way of."""

    def __init__(self, model: nn.Module, host: EngineHost, *, strict_memory: bool) -> None:
        self.model = model
        self.host = host
        self.strict_memory = strict_memory
        self.dropped: dict[str, str] = {}
        self.refused: Refused | None = None
        self._alike: bool | None = None

    def run(self, run: Run) -> Any:
        """Answer a call of stock's decoding loop.

        Raises:
            InvalidRequestError, ConfigError: it is larger than the K/V budget, and ``strict_memory`` was asked for.
        """
        reason = run.why_stock(self.model)
        if reason is not None:
            return run.as_stock(self.model, reason)
        self._reconsider()
        reason = self.dropped.get("native") or run.why_not_native(self.model)
        if reason is None:
            try:
                if run.returns_cache and not self._keeps_stocks_kv():
                    raise NotStarted("its cache is to come back, and keeps something else than attention's K/V")
                return run.natively(self.model, self.host)
            except NotStarted as failure:
                cause = failure.__cause__
                reason = str(failure) or str(cause)
            if isinstance(cause, (InvalidRequestError, ConfigError)):
                if self.strict_memory:
                    raise cause
                return run.as_stock(self.model, reason)
            if isinstance(cause, UnsupportedModel):
                self.refuse("native", reason)
            elif cause is not None:
                warn_once(f"the engine could not run a call, which runs without it: {reason}")
        obstacle = self.dropped.get("cache") or run.why_not_cache(self.model)
        if obstacle is None:
            try:
                return run.over_blocks(self.model, reason)
            except UnsupportedModel as error:
                obstacle = str(error)
                self.refuse("cache", obstacle)
        return run.as_stock(self.model, f"{reason}; {obstacle}")

    def found_wanting(self) -> dict[str, str]:
        """Tiers that the self-check has dropped, and why: those that refuse the model will do so again."""
        refused = self.refused.tiers if self.refused is not None else set()
        return {tier: why for tier, why in self.dropped.items() if tier not in refused}

    def refuse(self, tier: str, why: str) -> None:
        """Drop a tier as long as the model stays as it is."""
        refused = self.refused or Refused(self.model)
        refused.tiers.add(tier)
        self.dropped[tier], self.refused = why, refused

    def _reconsider(self) -> None:
        """Tiers that have refused the model may take it as it is now."""
        refused = self.refused
        if refused is not None and refused.outdated():
            self.refused = None
            for tier in refused.tiers:
                self.dropped.pop(tier, None)

    def _keeps_stocks_kv(self) -> bool:
        if self._alike is None:
            self._alike = lockstep.keeps_stocks_kv(self.model, self.host)
        return self._alike


class Refused:
    """Tiers that can't run the model, as it was then."""

    def __init__(self, model: nn.Module) -> None:
        self.tiers: set[str] = set()
        self._reach = Reach(model)
        self._watch = Watch(self._reach.modules)
        self._lock = threading.Lock()

    def outdated(self) -> bool:
        with self._lock:
            return self._reach.changed() is not None or self._watch.retyped()


class Run:
    """One call of stock's decoding loop, as stock has prepared it."""

    def __init__(
        self,
        name: str,
        loop: Callable[..., Any],  # stock's own: loop(model, input_ids, logits_processor=..., ...)
        input_ids: Tensor,  # i64 [B,L], padded
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **rest: Any,  # what goes to the model, and more arguments of the loop
    ) -> None:
        self.name = name
        self.input_ids = input_ids
        self._processors = logits_processor
        self._criteria = stopping_criteria
        self._config = generation_config
        self._rest = rest
        self._loop = functools.partial(loop, logits_processor=logits_processor, generation_config=generation_config)

    @property
    def returns_cache(self) -> bool:
        return bool(self._config.return_dict_in_generate and self._rest.get("use_cache", True))

    def why_stock(self, model: nn.Module) -> str | None:
        return tiers.why_stock(model, self.input_ids, self._config, self._rest)

    def why_not_native(self, model: nn.Module) -> str | None:
        inputs = {name: value for name, value in self._rest.items() if name not in _LOOP_ARGUMENTS}
        return tiers.why_not_native(model, self.name, self.input_ids, self._config, inputs)

    def why_not_cache(self, model: nn.Module) -> str | None:
        if not tiers.fresh_cache(upstream.cache_in(self._rest)):
            return "stock doesn't use its usual cache"
        if (compiled := compiled_part(model)) is not None:
            return f"{compiled} is compiled, which works with stock's own caches only"
        return None

    # ---- the tiers -----------------------------------------------------------------------------------------------

    def as_stock(self, model: nn.Module, reason: str) -> Any:
        try:
            return self._loop(model, self.input_ids, stopping_criteria=self._criteria, **self._rest)
        finally:  # an assistant's calls have reports too: the last is the call's own
            note(Report("stock", self.name, self.input_ids.shape[0], reason))

    def over_blocks(self, model: nn.Module, reason: str) -> Any:
        cache = PagedCache(model.config.get_text_config(decoder=True))
        try:
            result = self.over(model, cache)
        finally:
            tier: Tier = "cache" if cache.get_seq_length() else "stock"  # some models have no use for a cache
            note(Report(tier, self.name, self.input_ids.shape[0], reason))
        if upstream.cache_in_result(result) is cache:
            upstream.set_cache_in_result(result, cache.to_dynamic())
        return result

    def over(self, model: nn.Module, cache: Cache) -> Any:
        """What stock's loop returns over another cache than its own."""
        rest = upstream.with_cache(self._rest, cache)
        return self._loop(model, self.input_ids, stopping_criteria=self._criteria, **rest)

    def natively(self, model: nn.Module, host: EngineHost) -> Any:
        """
        Raises:
            NotStarted: the engine can't take the rows, and nothing has happened yet.
        """
        embeds = self._rest.get("inputs_embeds")
        given = self.input_ids if embeds is None else embeds  # [B,L], or [B,L,hidden]
        prompts = tiers.prompts_of(given, self._rest.get("attention_mask"))
        width = self.input_ids.shape[1]
        limits = [c.max_length for c in self._criteria if isinstance(c, MaxLengthCriteria)] or [self._config.max_length]
        streamer = self._rest.get("streamer")
        free_to_run = tiers.runs_free(
            model, self.name, self._processors, self._criteria, self._config, streamer, len(prompts)
        )
        if embeds is None and free_to_run:
            eos = [token for c in self._criteria if hasattr(c, "eos_token_id") for token in c.eos_token_id.tolist()]
            pad = upstream.pad_token(self._config)
            max_tokens = max(1, min(limits) - width)
            sequences = free.generate(host, self.input_ids, prompts, max_tokens, eos, pad or 0, streamer)
            note(Report("native", "free", len(prompts)))
            return sequences
        room = max(
            1, max(*limits, self._config.max_length) - width
        )  # which of them ends the call is the loop's business
        rows = lockstep.EngineRows(host, prompts, given.shape[1], room)
        try:
            return self._in_lockstep(model, rows)
        finally:
            rows.close()

    def _in_lockstep(self, model: nn.Module, rows: lockstep.EngineRows) -> Any:
        criteria = self._criteria
        if self.name == upstream.SAMPLE and tiers.may_drop_ended(self._processors, criteria, self._config):
            criteria = lockstep.Ended(criteria, rows)
        uses_cache = self._rest.get("use_cache", True)
        rest = upstream.with_cache(self._rest, rows) if uses_cache else self._rest
        result = self._loop(lockstep.view(model, rows), self.input_ids, stopping_criteria=criteria, **rest)
        note(Report("native", self.name, len(self.input_ids), None, *rows.num_blocks))
        if upstream.cache_in_result(result) is rows:
            prepared = upstream.cache_in(self._rest)
            rows.copy_to(prepared)
            upstream.set_cache_in_result(result, prepared)
        return result


def view(model: nn.Module, ways: Ways) -> Any:
    """The model with decoding loops of ours."""
    return views.view(model, _loops_of(type(model)), ways)


def custom_loop(custom: Callable[..., Any], ways: Tiers) -> Callable[..., Any]:
    """The caller's own decoding loop, given K/V in blocks."""
    return _instead_of("custom_generate", custom, ways)


@functools.cache
def _loops_of(kind: type) -> type:
    own = {name: _instead_of(name, getattr(kind, name)) for name in upstream.LOOPS if hasattr(kind, name)}
    return views.subclass(kind, own)


def _instead_of(name: str, stock: Callable[..., Any], ways: Tiers | None = None) -> Callable[..., Any]:
    @functools.wraps(stock)  # generate() looks at a loop's signature
    def loop(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        return (ways or self._paged_part).run(Run(name, stock, input_ids, **kwargs))

    return loop
