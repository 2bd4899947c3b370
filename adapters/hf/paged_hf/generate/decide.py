"""Which tier answers a call: decided here, and nowhere else, before anything is done.

Rules look at a call twice: as its caller has written it, for cases in which stock must not see our class; then as stock
has prepared it for a decoding loop. The tables below are tried from top to bottom. The first rule with a reason
decides, and the report gives that reason. docs/generate.md lists the rules in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import EosTokenCriteria, LogitsProcessor, MaxLengthCriteria, StoppingCriteria

from paged_hf import upstream
from paged_hf.generate import obstacles, raw_call
from paged_hf.generate.prepared import Prepared
from paged_hf.generate.raw_call import RawCall
from paged_hf.generate.report import Tier

_Call = TypeVar("_Call")
Rule = Callable[[_Call], "str | None"]
"""The reason against it, or None."""

TO_STOCK_AS_ASKED: tuple[Rule[RawCall], ...] = (
    raw_call.not_patched_itself,
    raw_call.arguments_fit_no_call,
    raw_call.stock_is_in_force,
    raw_call.names_another_generate,
    raw_call.passes_a_loop_by_position,
    raw_call.wants_stocks_own_batching,
    raw_call.passes_a_cache,
    raw_call.model_prepares_inputs_otherwise,
)
TO_STOCK_AROUND_PEFT: tuple[Rule[RawCall], ...] = (  # for a call of a PEFT model, which calls the model inside it
    raw_call.stock_is_in_force,
    raw_call.names_an_adapter_for_each_row,
)
TO_STOCK: tuple[Rule[Prepared], ...] = (
    obstacles.model_has_an_encoder,
    obstacles.processes_keep_step,
    obstacles.wants_what_forwards_see,
    obstacles.wants_another_kind_of_cache,
    obstacles.wants_to_be_compiled,
    obstacles.assists_another_model,
    obstacles.brings_media,
    obstacles.positions_are_for_other_rows,
    obstacles.cache_is_the_callers,
    obstacles.trains_with_noise,
)
NOT_NATIVE: tuple[Rule[Prepared], ...] = (
    obstacles.loop_is_unknown,
    obstacles.passes_more_to_the_model,
    obstacles.searches_beams_without_a_cache,
    obstacles.prefills_in_chunks,
    obstacles.computes_under_autocast,
    obstacles.prompts_are_no_rows_of_ids,
    obstacles.mask_has_another_shape,
    obstacles.mask_has_other_values,
    obstacles.padding_is_not_on_the_left,
    obstacles.padding_is_no_token,
    obstacles.positions_have_another_shape,
    obstacles.positions_are_unusual,
    obstacles.class_prepares_inputs_otherwise,
    obstacles.someone_sees_batches,
)
NOT_OVER_BLOCKS: tuple[Rule[Prepared], ...] = (
    obstacles.cache_is_not_the_usual,
    obstacles.model_is_compiled,
)


@dataclass(frozen=True)
class Native:
    """The engine runs the rows."""

    free: bool  # each row by itself; else when stock's loop asks for it
    drops_ended: bool  # the loop's rows that have ended are computed no further


@dataclass(frozen=True)
class OverBlocks:
    """Stock's loop runs the user's model, over a cache that keeps K/V in blocks."""

    reason: str  # why not natively


@dataclass(frozen=True)
class Stock:
    """Stock's loop as it is."""

    reason: str  # why not natively, and why not over blocks


Decision = Native | OverBlocks | Stock


def decide_as_asked(call: RawCall, rules: Iterable[Rule[RawCall]] = TO_STOCK_AS_ASKED) -> Stock | None:
    """None: let stock prepare the call."""
    reason = _first_reason(rules, call)
    return None if reason is None else Stock(reason)


def decide(call: Prepared, known: Mapping[Tier, str]) -> Decision:
    """``known``: what is known to stand in the way of some tiers, whatever the call is."""
    reason = _first_reason(TO_STOCK, call)
    if reason is not None:
        return Stock(reason)
    reason = known.get("native") or _first_reason(NOT_NATIVE, call)
    if reason is None:
        return Native(free=_runs_free(call), drops_ended=_may_drop_ended(call))
    obstacle = known.get("cache") or _first_reason(NOT_OVER_BLOCKS, call)
    return OverBlocks(reason) if obstacle is None else Stock(f"{reason}; {obstacle}")


def _runs_free(call: Prepared) -> bool:
    """Whether each row may run on its own: plain greedy search, of which only the tokens are visible."""
    return (
        call.embeds is None
        and _is_plain_greedy_search(call)
        and not call.config.return_dict_in_generate
        and (call.rest.get("streamer") is None or call.num_rows == 1)
        and (upstream.pad_token(call.config) is not None or not _ends_at_tokens(call))
    )


def _is_plain_greedy_search(call: Prepared) -> bool:
    return (
        call.name == upstream.SAMPLE
        and upstream.has_the_usual_sampling(type(call.model))
        and not call.config.do_sample
        and not len(call.processors)
        and all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in call.criteria)
    )


def _may_drop_ended(call: Prepared) -> bool:
    """Whether it is invisible that ended rows are computed no further."""
    return (
        call.name == upstream.SAMPLE
        and _ends_at_tokens(call)
        and not call.config.return_dict_in_generate
        and all(type(processor).__module__ == LogitsProcessor.__module__ for processor in call.processors)
        and all(type(criterion).__module__ == StoppingCriteria.__module__ for criterion in call.criteria)
    )


def _ends_at_tokens(call: Prepared) -> bool:
    """Stock's own condition for padding rows that have ended."""
    return any(hasattr(criterion, "eos_token_id") for criterion in call.criteria)


def _first_reason(rules: Iterable[Rule[Any]], call: Any) -> str | None:
    for rule in rules:
        if (reason := rule(call)) is not None:
            return reason
    return None
