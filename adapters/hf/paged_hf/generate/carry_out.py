"""Carries a decision out: a prepared call runs natively, over blocks, or on stock, and is reported.

Nothing here chooses between tiers. A tier that can't run the call raises before anything has happened.
"""

from __future__ import annotations

from typing import Any

from transformers import MaxLengthCriteria

from paged_core import UnsupportedModel
from paged_hf import upstream
from paged_hf.cache.paged_cache import PagedCache
from paged_hf.generate import free, lockstep
from paged_hf.generate.calls import NotStarted
from paged_hf.generate.decide import Decision, Native, OverBlocks
from paged_hf.generate.host import EngineHost
from paged_hf.generate.prepared import Prepared
from paged_hf.generate.report import Report, Tier, note


def carry_out(decision: Decision, call: Prepared, host: EngineHost) -> Any:
    """What ``generate`` returns.

    Raises:
        NotStarted: the engine can't run the rows, or a paged cache can't serve the model; nothing has happened yet.
    """
    if isinstance(decision, Native):
        return _free(call, host) if decision.free else _in_lockstep(call, host, decision.drops_ended)
    if isinstance(decision, OverBlocks):
        return _over_blocks(call, decision.reason)
    return as_stock(call, decision.reason)


def as_stock(call: Prepared, reason: str) -> Any:
    try:
        return call.run(call.model)
    finally:  # the calls of an assistant model have reports too; the last one belongs to the call
        note(Report("stock", call.name, call.num_rows, reason))


def _over_blocks(call: Prepared, reason: str) -> Any:
    try:
        cache = PagedCache(call.model.config.get_text_config(decoder=True))
    except UnsupportedModel as error:
        raise NotStarted from error
    try:
        result = call.run(call.model, cache=cache)
    finally:
        tier: Tier = "cache" if cache.get_seq_length() else "stock"  # some models have no use for a cache
        note(Report(tier, call.name, call.num_rows, reason))
    if upstream.cache_in_result(result) is cache:
        upstream.set_cache_in_result(result, cache.to_dynamic())
    return result


def _free(call: Prepared, host: EngineHost) -> Any:
    eos = [token for c in call.criteria if hasattr(c, "eos_token_id") for token in c.eos_token_id.tolist()]
    max_tokens = max(1, min(_lengths(call)) - call.input_ids.shape[1])
    sequences = free.generate(
        host,
        call.input_ids,
        unpadded(call),
        max_tokens,
        eos,
        upstream.pad_token(call.config) or 0,
        call.rest.get("streamer"),
    )
    note(Report("native", "free", call.num_rows))
    return sequences


def _in_lockstep(call: Prepared, host: EngineHost, drops_ended: bool) -> Any:
    longest = max(*_lengths(call), call.config.max_length)  # the loop decides which of them ends the call
    max_tokens = max(1, longest - call.input_ids.shape[1])
    rows = lockstep.EngineRows(host, unpadded(call), call.prompts.shape[1], max_tokens)
    try:
        criteria = lockstep.Ended(call.criteria, rows) if drops_ended else None
        seen = lockstep.twin(call.model, rows)
        result = call.run(seen, criteria=criteria, cache=rows if call.uses_cache else None)
        note(Report("native", call.name, call.num_rows, None, *rows.num_blocks))
        if upstream.cache_in_result(result) is rows:
            rows.copy_to(call.cache)
            upstream.set_cache_in_result(result, call.cache)
        return result
    finally:
        rows.close()


def unpadded(call: Prepared) -> list[Any]:
    """The prompts without padding: lists of token ids, or embeddings ``[n, hidden]``."""
    given, hidden = call.prompts, call.hidden
    if hidden is None:
        return list(given) if given.is_floating_point() else given.tolist()
    real = (~hidden).to(given.device)  # bool [B,L]
    rows = [row[kept] for row, kept in zip(given, real, strict=True)]
    return rows if given.is_floating_point() else [row.tolist() for row in rows]


def _lengths(call: Prepared) -> list[int]:
    """Those at which the call's criteria end it."""
    found = [criterion.max_length for criterion in call.criteria if isinstance(criterion, MaxLengthCriteria)]
    return found or [call.config.max_length]
