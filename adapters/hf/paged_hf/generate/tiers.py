"""The tiers of one patched model: a call's tier is chosen and runs the call, and another one is chosen if that turns
out to be impossible."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from paged_core import ConfigError, InvalidRequestError, UnsupportedModel
from paged_hf.generate import lockstep
from paged_hf.generate.calls import NotStarted
from paged_hf.generate.carry_out import carry_out
from paged_hf.generate.decide import Decision, Native, OverBlocks, Stock, decide
from paged_hf.generate.host import EngineHost
from paged_hf.generate.prepared import Prepared
from paged_hf.generate.report import Tier, warn_once
from paged_hf.model.reach import Reach
from paged_hf.model.watch import WatchedModules


class Tiers:
    """How one patched model answers. ``dropped``: tiers that aren't used, and why. ``refused``: those of them that may
    work again once the model has changed."""

    def __init__(self, model: Any, host: EngineHost, *, strict_memory: bool) -> None:
        self.model = model
        self.host = host
        self.strict_memory = strict_memory
        self.dropped: dict[Tier, str] = {}
        self.refused: Refused | None = None
        self._alike: bool | None = None

    def answer(self, call: Prepared) -> Any:
        """What stock's loop would return for a call of this model.

        Raises:
            InvalidRequestError, ConfigError: it is larger than the K/V budget, and ``strict_memory`` is set.
        """
        self._reconsider()
        decision = decide(call, self.dropped)
        while not isinstance(decision, Stock):
            try:
                if isinstance(decision, Native):
                    self._refuse_foreign_kv(call)
                return carry_out(decision, call, self.host)
            except NotStarted as failure:
                decision = self._instead(decision, call, failure)
        return carry_out(decision, call, self.host)

    def found_wanting(self) -> dict[Tier, str]:
        """Tiers that the self-check has dropped, and why; a tier that refuses the model is not among them, since it
        will refuse it again."""
        refused = self.refused.tiers if self.refused is not None else set()
        return {tier: why for tier, why in self.dropped.items() if tier not in refused}

    def refuse(self, tier: Tier, why: str) -> None:
        """Drop a tier as long as the model stays as it is."""
        refused = self.refused or Refused(self.model)
        refused.tiers.add(tier)
        self.dropped[tier], self.refused = why, refused

    def _instead(self, decision: Native | OverBlocks, call: Prepared, failure: NotStarted) -> Decision:
        """The next choice for a call for which ``decision`` couldn't be carried out."""
        cause = failure.__cause__
        reason = str(failure) or str(cause)
        if isinstance(cause, (InvalidRequestError, ConfigError)):
            if self.strict_memory:
                raise cause
            return Stock(reason)
        tier: Tier = "native" if isinstance(decision, Native) else "cache"
        if isinstance(cause, UnsupportedModel):
            self.refuse(tier, reason)
        elif cause is not None:
            warn_once(f"the engine could not run a call, which runs without it: {reason}")
        found: Mapping[Tier, str] = {tier: reason}
        if isinstance(decision, OverBlocks):
            found = {"native": decision.reason, **found}
        return decide(call, {**self.dropped, **found})

    def _reconsider(self) -> None:
        """Let tiers try again that had refused the model before it changed."""
        refused = self.refused
        if refused is not None and refused.outdated():
            self.refused = None
            for tier in refused.tiers:
                self.dropped.pop(tier, None)

    def _refuse_foreign_kv(self, call: Prepared) -> None:
        """Raise NotStarted for a call that returns its cache, if stock's cache would hold something else than our
        blocks. Only the engine can tell: it runs the model once."""
        if not call.returns_cache:
            return
        if self._alike is None:
            self._alike = lockstep.keeps_stocks_kv(self.model, self.host)
        if not self._alike:
            raise NotStarted("its cache is to come back, and keeps something else than attention's K/V")


class Refused:
    """Tiers that can't run the model in its state at that time."""

    def __init__(self, model: Any) -> None:
        self.tiers: set[Tier] = set()
        self._reach = Reach(model)
        self._watch = WatchedModules(self._reach.modules)
        self._lock = threading.Lock()

    def outdated(self) -> bool:
        with self._lock:
            return self._reach.changed() is not None or self._watch.retyped()
