"""Stock's own decoding loop, with the engine in place of the model. The loop runs in the caller's thread and chooses
the tokens, so processors, criteria, draws and scores are exactly stock's. Its rows are a lockstep group of the engine's
batch: after each step they are held until the loop brings
their next tokens. A beam step names the rows that they continue: a fork.

Of stock's loops, this file knows only what they call: the model, and ``reorder_cache`` of its cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StoppingCriteriaList

from paged_core import (
    Engine,
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    Selection,
    TokenSelector,
    UnsupportedModel,
)
from paged_hf import upstream
from paged_hf.generate import twins
from paged_hf.generate.calls import EngineCall, NotStarted, check_length, check_tokens
from paged_hf.generate.host import EngineHost
from paged_hf.model.rounding import allowed_beside, difference, narrow_dtype, reading, tolerance


class LockstepCall(EngineCall, TokenSelector):
    """A group of rows whose tokens the caller chooses. It is the group's own selector.

    A prompt is a list of token ids, or embeddings ``[n, hidden]``.
    """

    def __init__(self, host: EngineHost, prompts: Sequence[Any], max_tokens: int, padded: bool) -> None:
        super().__init__(padded)
        self._host = host
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._ids: list[int] = []
        self.num_blocks = self.num_blocks_shared = 0  # in the latest step: used, and saved by sharing

    def enter(self, engine: Engine, name: str) -> list[Request]:
        check_length(engine, self._prompts, self._max_tokens)
        limit = engine.sizes.max_num_seqs
        if len(self._prompts) > limit:
            raise NotStarted(f"{len(self._prompts)} rows must advance together, but at most {limit} run at once")
        if isinstance(self._prompts[0], Tensor):
            prompts = self._borrow(self._prompts)
        else:
            prompts = self._prompts
            check_tokens(engine, prompts)
        params = SamplingParams(max_tokens=self._max_tokens, ignore_eos=True)
        return engine.add_group(name, prompts, params, selector=self)

    def _borrow(self, prompts: Sequence[Tensor]) -> Sequence[Sequence[int]]:
        """Ids for embeddings; equal consecutive rows (beams, samples) get the same ids."""
        made: list[list[int]] = []
        own = self._host.paged_model.embedding_dtype
        if prompts[0].dtype != own:
            raise NotStarted(f"inputs_embeds are {prompts[0].dtype}, the model's own are {own}")
        try:
            for i, rows in enumerate(prompts):
                if i == 0 or not torch.equal(rows, prompts[i - 1]):
                    ids = self._host.paged_model.acquire_ids(rows)
                    self._ids += ids
                made.append(ids)
        except UnsupportedModel as error:
            raise NotStarted(str(error)) from None  # because of this call, not of the model
        return made

    def leave(self) -> None:
        if self._ids:
            self._host.paged_model.release_ids(self._ids)

    def select(self, logits: Tensor, requests: Sequence[Request]) -> Selection:
        """Hand ``logits [S, vocab]`` to the caller; the tokens come later."""
        used = {block for request in requests for block in request.block_table}
        self.num_blocks = len(used)
        self.num_blocks_shared = sum(len(request.block_table) for request in requests) - len(used)
        logits = logits.clone()  # the next step may write over them
        if logits.is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()  # the caller may be on another stream
        self._host.handed(self)
        self.tell(([request.index for request in requests], logits))
        return Selection([None] * len(requests))

    def take(self, output: RequestOutput) -> None:
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.tell(RequestError(output.request.id, output.error or "it was aborted"))


class EngineRows(DynamicCache):  # type: ignore[misc]
    """Takes the place of the K/V cache in stock's loop: rows of the engine's batch instead of tensors."""

    def __init__(self, host: EngineHost, prompts: Sequence[Any], width: int, max_tokens: int) -> None:
        super().__init__()
        self._host = host
        self._call = LockstepCall(host, prompts, max_tokens, padded=any(len(prompt) < width for prompt in prompts))
        self._num_rows = len(prompts)
        self._width = width  # of the padded prompts
        self._num_steps = 0
        self._logits: Tensor  # of the latest step
        self._parents: list[int] | None = None
        self.ended: Tensor | None = None  # bool [B]: rows whose logits are no longer needed

    def forward(self, next_ids: Tensor | None) -> Tensor:
        """``next_ids i64 [B]``, ignored the first time: the prompts are known. ``-> logits [B, 1, vocab]``"""
        if self._num_steps == 0:
            self._host.open(self._call)
        else:
            assert next_ids is not None
            tokens, parents = next_ids.tolist(), self._parents
            ended = self.ended.tolist() if self.ended is not None else [False] * self._num_rows
            if all(ended):  # a loop that checks its criteria one step late: these logits are never used
                return self._logits.new_zeros(self._num_rows, 1, self._logits.shape[-1])
            self._host.post(self._call, lambda engine: self._resume(engine, tokens, parents, ended))
        self._parents = None
        order: list[int]
        logits: Tensor  # [S, vocab]: of the rows in that order
        try:
            order, logits = self._call.wait()
        except NotStarted:
            raise
        except Exception as error:
            if self._num_steps == 0:
                raise NotStarted from error
            raise
        self._num_steps += 1
        if order != list(range(self._num_rows)):
            everyone = logits.new_zeros(self._num_rows, logits.shape[1])  # [B, vocab]; zeros for rows that have ended
            everyone[order] = logits
            logits = everyone
        self._logits = logits
        return logits[:, None]

    def _resume(self, engine: Engine, tokens: list[int], parents: list[int] | None, ended: list[bool]) -> None:
        rows = self._call.rows
        for row, gone in zip(rows, ended, strict=True):
            if gone:
                engine.stop(row)
        live = [i for i, gone in enumerate(ended) if not gone]
        engine.resume([rows[i] for i in live], [tokens[i] for i in live], parents)

    def close(self) -> None:
        self._host.close(self._call)

    @property
    def num_blocks(self) -> tuple[int, int]:
        """K/V blocks that the rows used in their latest step, and blocks saved by sharing."""
        return self._call.num_blocks, self._call.num_blocks_shared

    def read(self, rows: Sequence[int]) -> list[list[tuple[Tensor, Tensor]]]:
        """What the blocks of some rows hold: of each row, of each layer ``(k [K,n,D], v [K,n,Dv])``."""

        def look(engine: Engine) -> None:
            requests = [self._call.rows[i] for i in rows]
            if all(request.num_computed == len(request.tokens) for request in requests):
                self._call.tell([engine.read_kv(request) for request in requests])
            else:  # they were preempted: after they are computed again, their logits come as after every step
                engine.recompute(self._call.rows)

        while True:
            self._host.post(self._call, look)
            news = self._call.wait()
            if isinstance(news, list):
                return news

    def copy_to(self, cache: Cache) -> None:
        """Fill an empty cache with the rows' K/V, left-padded with zeros, for the caller to keep."""
        rows = self.read(self._parents or range(self._num_rows))
        for layer in range(len(rows[0])):
            keys, values = (_left_padded([row[layer][i] for row in rows], self.get_seq_length()) for i in (0, 1))
            cache.update(keys, values, layer)

    # ---- what loops and models ask of a cache --------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._width + self._num_steps - 1 if self._num_steps else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        before = self._parents or range(self._num_rows)
        self._parents = [before[i] for i in beam_idx.tolist()]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the engine keeps K/V by itself")

    crop = batch_repeat_interleave = batch_select_indices = update


class Ended(StoppingCriteriaList):  # type: ignore[misc]
    """The call's criteria; also tells ``rows`` which of them have ended."""

    def __init__(self, criteria: StoppingCriteriaList, rows: EngineRows) -> None:
        super().__init__(criteria)
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended: Tensor = super().__call__(input_ids, scores, **kwargs)
        self._rows.ended = ended if self._rows.ended is None else self._rows.ended | ended
        return ended


def twin(model: Any, rows: EngineRows) -> Any:
    """The model, with the engine answering its calls."""
    kind: type = type(model)
    return twins.twin(model, _answered(kind), rows)


@functools.cache
def _answered(kind: type) -> type:
    def call(self: Any, input_ids: Tensor | None = None, use_cache: bool | None = None, **inputs: Any) -> Any:
        rows: EngineRows = self._paged_part
        next_ids = None if input_ids is None else input_ids[:, -1]
        return upstream.output_with_cache(rows.forward(next_ids), None if use_cache is False else rows)

    def reorder_cache(self: Any, cache: Any, beam_idx: Tensor) -> Any:
        self._paged_part.reorder_cache(beam_idx)
        return cache

    return twins.subclass(kind, upstream.answering(call, reorder_cache))


def keeps_stocks_kv(model: Any, host: EngineHost) -> bool:
    """Whether our blocks hold what the model puts into stock's cache. Attention may see something else: compressed
    latents, layers that share K/V or attend twice.

    Raises:
        NotStarted: the engine can't run the model.
    """
    ids = torch.arange(1, 5)
    rows = EngineRows(host, [ids.tolist()], len(ids), 1)
    try:
        rows.forward(None)
        ours = [part for pair in rows.read([0])[0] for part in pair]  # 2 L of [K,n,D]
    finally:
        rows.close()
    ids, narrow = ids[None].to(ours[0].device), narrow_dtype(model)
    theirs = _stocks_kv(model, ids)
    exact = None if narrow is None else reading(lambda: _stocks_kv(model, ids))
    if exact is None:
        limits = [tolerance(its.dtype if narrow is None else narrow) for its in theirs]
    else:
        assert narrow is not None
        limits = [allowed_beside(difference(its, want), narrow) for its, want in zip(theirs, exact, strict=True)]
    return len(ours) == len(theirs) and all(
        mine.shape[::2] == its.shape[::2]
        and mine.shape[1] >= its.shape[1]
        and difference(mine[:, -its.shape[1] :], its) <= limit  # a window keeps the last few
        for mine, its, limit in zip(ours, exact or theirs, limits, strict=True)
    )


def _stocks_kv(model: Any, ids: Tensor) -> list[Tensor]:
    """What one call of the model puts into stock's cache for ``ids [1,n]``: keys and values of each layer, [K,n,D]."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model(ids, use_cache=True, **{upstream.cache_argument(type(model).forward): cache})
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return [part[0] for layer in layers for part in (layer.keys, layer.values)]


def _left_padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """B of ``[K,n,D]`` -> ``[B,K,length,D]``"""
    whole = rows[0].new_zeros(len(rows), rows[0].shape[0], length, rows[0].shape[2])
    for i, row in enumerate(rows):
        whole[i, :, length - row.shape[1] :] = row
    return whole
