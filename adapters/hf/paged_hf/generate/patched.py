"""``model.generate = paged_generate(model)``: stock's generate() on paged memory, concurrent callers batched together.

This file has the object that replaces the method: patching, restoring the original, copying, pickling. Stock interprets
the call, and decide.py chooses its tier.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

from torch import Tensor, nn

from paged_core import EngineConfig, EngineSizes, UnsupportedModel
from paged_hf import upstream
from paged_hf.generate import loops, selfcheck
from paged_hf.generate.decide import TO_STOCK_AROUND_PEFT, decide_as_asked
from paged_hf.generate.host import EngineHost
from paged_hf.generate.raw_call import RawCall
from paged_hf.generate.report import Report, forget, last_report, note
from paged_hf.generate.tiers import Tiers

_log = logging.getLogger("paged_hf")
_MAX_NUM_SEQS = 256  # rows of all calls that run at once
_SLAB_BYTES = 64 << 20  # bytes by which the K/V cache grows
_GPU_SLAB_BYTES = 1 << 30  # there each growth also drops the CUDA graphs, which are captured again
_MISSING = object()


class PagedGenerate:
    """Replaces one model's ``generate``; made by ``paged_generate``. As a context manager it patches the model on
    entry, and restores it on exit.
    """

    def __init__(self, model: Any, kv_cache_memory: int | None = None, over_budget: str = "stock") -> None:
        self.model = model
        self.kv_cache_memory = kv_cache_memory
        self.over_budget = over_budget
        slab = _SLAB_BYTES if str(getattr(model, "device", "cpu")) == "cpu" else _GPU_SLAB_BYTES
        self.config = EngineConfig(kv_cache_bytes=kv_cache_memory, kv_cache_slab_bytes=slab, max_num_seqs=_MAX_NUM_SEQS)
        self.tiers = Tiers(model, EngineHost(model, self.config), strict_memory=over_budget == "raise")
        self._here = threading.local()  # .paused: calls of this thread go to stock
        self._before: list[Any] = []  # what the model had at each entry, to restore it
        for name in functools.WRAPPER_ASSIGNMENTS:
            setattr(self, name, getattr(self.stock, name))
        self.__signature__ = inspect.signature(self.stock)

    @property
    def stock(self) -> Callable[..., Any]:
        """The model's own ``generate``."""
        return MethodType(type(self.model).generate, self.model)

    @property
    def inner(self) -> PagedGenerate:
        """The replacement that has the tiers: that of the transformers model itself."""
        return self

    # Attributes of a bound method: users call ``model.generate.__wrapped__(model, ...)`` for the gradients.

    @property
    def __self__(self) -> Any:
        return self.model

    @property
    def __func__(self) -> Callable[..., Any]:
        return type(self.model).generate  # type: ignore[no-any-return]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.__func__.__wrapped__  # type: ignore[attr-defined, no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forget()
        with self.tiers.host.caller():
            return self._generate(args, kwargs)

    def _generate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        decision = decide_as_asked(self._raw_call(args, kwargs))
        if decision is not None:
            return self._as_stock(args, kwargs, decision.reason)
        if callable(kwargs.get("custom_generate")):
            kwargs["custom_generate"] = loops.custom_loop(kwargs["custom_generate"], self.tiers)
        return type(self.model).generate(loops.twin(self.model, self.tiers), *args, **kwargs)

    def _raw_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RawCall:
        return RawCall(self.model, args, kwargs, as_stock=getattr(self._here, "paused", False))

    def _as_stock(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
        result = self.stock(*args, **kwargs)
        sequences = getattr(result, "sequences", result)
        note(Report("stock", "generate", len(sequences) if isinstance(sequences, Tensor) else 0, reason))
        return result

    @contextmanager
    def as_stock(self) -> Iterator[None]:
        """Calls of this thread go to stock inside the ``with`` block."""
        before = getattr(self._here, "paused", False)
        self._here.paused = True
        try:
            yield
        finally:
            self._here.paused = before

    def last_report(self) -> Report | None:
        """How the calling thread's latest call was answered."""
        return last_report()

    @property
    def sizes(self) -> EngineSizes | None:
        """The sizes that result from ``config``; None until a call has needed the engine."""
        engine = self.tiers.host.engine
        return engine.sizes if engine is not None else None

    def release(self) -> bool:
        """Free the K/V memory; the next call allocates it again. False: calls are open, and nothing was done."""
        return self.tiers.host.release()

    def __enter__(self) -> PagedGenerate:
        self._before.append(vars(self.model).get("generate", _MISSING))
        self.model.generate = self
        return self

    def __exit__(self, *exception: object) -> None:
        before = self._before.pop()
        vars(self.model).pop("generate", None)
        if before is not _MISSING:
            self.model.generate = before
        if before is not self:
            self._drop()

    def _drop(self) -> None:
        self.tiers.host.drop()

    def __reduce__(self) -> Any:
        """A copied or loaded model gets its own replacement, with its own engine."""
        return (
            type(self),
            (self.model, self.kv_cache_memory, self.over_budget),
            {"dropped": self.tiers.found_wanting()},
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.tiers.dropped = dict(state["dropped"])

    def __repr__(self) -> str:
        return f"<paged generate of {type(self.model).__name__}>"


class PagedPart(PagedGenerate):
    """For the transformers model inside a PEFT model: paged if the patched PEFT model calls it, else stock."""

    @contextmanager
    def called(self) -> Iterator[None]:
        """Inside the ``with`` block, calls of this thread come from the patched PEFT model."""
        self._here.called = True
        try:
            yield
        finally:
            self._here.called = False

    def _raw_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RawCall:
        return replace(super()._raw_call(args, kwargs), by_wrapper=getattr(self._here, "called", False))


class PagedWrapper(PagedGenerate):
    """For a PEFT model: its own ``generate`` runs, and calls the paged ``generate`` of the transformers model
    inside."""

    @property
    def inner(self) -> PagedPart:
        base = _transformers_model(self.model)
        found = vars(base).get("generate")
        settings = (self.kv_cache_memory, self.over_budget)
        if not isinstance(found, PagedPart) or (found.kv_cache_memory, found.over_budget) != settings:
            found = base.generate = PagedPart(base, *settings)
        return found

    @property
    def stock(self) -> Callable[..., Any]:
        return MethodType(type(self.model).generate, self.model)  # which finds the inner model's as stock's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forget()
        decision = decide_as_asked(self._raw_call(args, kwargs), TO_STOCK_AROUND_PEFT)
        if decision is not None:
            return self._as_stock(args, kwargs, decision.reason)
        with self.inner.called():
            return self.stock(*args, **kwargs)

    @property
    def sizes(self) -> EngineSizes | None:
        return self.inner.sizes

    def release(self) -> bool:
        return self.inner.release()

    def _drop(self) -> None:
        self.inner._drop()
        del _transformers_model(self.model).generate


def paged_generate(
    model: Any,
    *,
    kv_cache_memory: int | None = None,
    over_budget: str = "stock",
    check: bool = True,
    strict: bool = False,
) -> PagedGenerate:
    """A replacement for ``model.generate``: the same arguments and answers, from paged K/V memory.

    ``model.generate = paged_generate(model)`` is the whole integration. Any number of threads may call it at once.

    Args:
        model: a transformers model for causal language modelling, or a PEFT model of one.
        kv_cache_memory: most bytes of K/V; None: a quarter of the device's free memory, at most 4 GiB.
        over_budget: what to do with a call that needs more: "stock" (with a warning) or "raise".
        check: compare each tier with stock on a few tokens first, and drop a tier that differs. Warn if not even plain
        greedy calls will run on the engine.
        strict: raise instead of that warning.

    Raises:
        TypeError: the model has no ``generate``.
        ValueError: ``over_budget`` is neither of these, or ``strict`` is set without ``check``.
        UnsupportedModel: plain greedy calls won't run on the engine, and ``strict`` is set.
    """
    if over_budget not in ("stock", "raise"):
        raise ValueError(f"over_budget is {over_budget!r}; use 'stock' or 'raise'")
    if strict and not check:
        raise ValueError("strict=True goes by what the self-check finds; leave check=True")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if not isinstance(model, nn.Module) or not hasattr(type(model), "generate"):
        raise TypeError(
            f"{type(model).__name__} has no generate(); give a transformers model with a language-model head"
        )
    patched = _standing_in_already(model, kv_cache_memory, over_budget)
    if patched is None:
        wraps = _transformers_model(model) is not model
        patched = (PagedWrapper if wraps else PagedGenerate)(model, kv_cache_memory, over_budget)
    elif not patched.inner.tiers.dropped and not strict:
        return patched
    else:
        patched.inner.tiers.dropped.clear()  # the model may have changed since
    if check:
        _check(patched, strict)
    return patched


def _standing_in_already(model: Any, kv_cache_memory: int | None, over_budget: str) -> PagedGenerate | None:
    """The existing replacement of this model's generate with these settings; one with other settings frees its
    memory."""
    before = vars(model).get("generate")
    if not isinstance(before, PagedGenerate) or isinstance(before, PagedPart) or before.model is not model:
        return None
    if (before.kv_cache_memory, before.over_budget) == (kv_cache_memory, over_budget):
        return before
    before._drop()
    return None


def _check(patched: PagedGenerate, strict: bool) -> None:
    tiers = patched.inner.tiers
    obstacle = selfcheck.run(tiers)
    if obstacle is None:
        return
    message = (
        f"not even plain greedy calls of {type(tiers.model).__name__} will run in the native tier: {obstacle} "
        f"({upstream.way_out()})"
    )
    if strict:
        patched._drop()
        raise UnsupportedModel(message)
    _log.warning("paged_generate: %s", message)


paged_generate.last_report = last_report  # type: ignore[attr-defined]


def _transformers_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") and hasattr(model, "peft_config") else model
