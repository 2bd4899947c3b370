"""The protocols of the execution side: what a model, an attention backend and a token selector must do.

Shape letters (docs/kv_layout.md): T tokens this step, R requests, B blocks per table, S sampled rows, L layers,
H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from paged_core.execution.batch import AttentionMetadata
from paged_core.execution.kv_cache import KVCache
from paged_core.execution.spec import ModelSpec
from paged_core.scheduling.request import Request, Selection


class Attend(Protocol):
    """Stores this step's K/V of one layer, then attends over all that the block tables hold."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        """``q [T,H,D], k [T,K,D], v [T,K,Dv], sinks [H], key_bias f32 [H,P] -> [T,H,Dv]``; called once for each layer
        a step. P is no less than ``max_model_len``."""
        ...


ModuleForward = Callable[..., Any]
"""Stands in for a module's ``forward``: same arguments, same meaning. It may carry ``stale() -> bool``, with
``follows_module = True`` if only changes of the module (weights, attributes, children) make it so: a model that watches
these itself asks only after one. And ``calls_children = True`` if it calls the module's children, which are then asked
for too."""


@runtime_checkable
class PagedModel(Protocol):
    """A causal language model that leaves K/V memory and attention to the engine.

    One whose ``forward`` does in Python what no CUDA graph repeats (hooks of its users) says ``replayable = False``.
    When that changes for good, ``refresh`` returns True.
    """

    @property
    def spec(self) -> ModelSpec: ...

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend, sample_indices: Tensor) -> Tensor:
        """``token_ids i64 [T], positions i64 [T], sample_indices i64 [S] -> logits [S, vocab]`` (any float dtype).

        Several requests' tokens stand packed one after another; which belongs to which is attend's business.
        """
        ...


@runtime_checkable
class AcceleratedModel(Protocol):
    """A PagedModel whose torch submodules may be stood in for by faster forwards, in the engine's steps only."""

    def accelerate(self, create: Callable[[torch.nn.Module], ModuleForward | None]) -> int:
        """Ask ``create`` once for each submodule; use what it answers. Returns how many were taken."""
        ...

    def refresh(self) -> bool:
        """Called when the engine wakes from idleness. True: the weights changed since, cached K/V are worthless."""
        ...


@runtime_checkable
class CompilableModel(Protocol):
    """A PagedModel that can run its modules through torch.compile. It is then called with an ``attend`` that a
    compiled graph may call. What the compiler can't do, the model does without."""

    @property
    def compiled(self) -> bool: ...

    def compile_forward(self, wanted: bool) -> None:
        """Compile with the next call of ``forward``, or no longer. Faster forwards are then gone."""
        ...


@runtime_checkable
class EmbeddingModel(Protocol):
    """A PagedModel that was given embeddings, and takes token ids beyond its vocabulary for them in prompts."""

    def knows(self, token_id: int) -> bool:
        """Whether the id, which is none of the vocabulary's, stands for an embedding."""
        ...


class AttentionBackend(Protocol):
    """Attention over paged K/V. Planned once a step, run once a layer.

    One that stores and reads quantised caches with their scales says ``reads_scales = True``; others aren't given
    such a cache. One whose ``plan`` and ``run`` never wait for the device says ``capturable = True``: decode steps are
    then replayed as CUDA graphs, where a row of padding has a ``seq_lens`` of 0 and ``max_seq_len`` is a bound. One
    that compiles kernels may count them in ``num_compiles``.
    """

    name: str

    def plan(self, metadata: AttentionMetadata) -> None:
        """Take in this step's shape; metadata tensors live on the CPU unless the model's device differs."""
        ...

    def run(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: KVCache,
        sinks: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """Store k, v at the planned slots, then attend: ``q [T,H,D] -> [T,H,Dv]`` in q's dtype.

        ``key_bias f32 [H,P]`` is passed for layers with ``has_key_bias`` only.
        """
        ...

    def copy_blocks(self, cache: KVCache, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) in every layer, in order: copy-on-write."""
        ...


class Chosen(Protocol):
    """The next tokens of some rows, which the host may not know yet."""

    token_ids: Tensor  # int64 [S]

    def keep(self, rows: Sequence[int]) -> Chosen:
        """Those rows only."""
        ...

    def fetch(self) -> Selection:
        """Wait for them."""
        ...


class TokenSelector(Protocol):
    """Logits of some rows in, the next token of each out."""

    def select(self, logits: Tensor, requests: Sequence[Request]) -> Selection:
        """``logits [S, vocab]``, row i for ``requests[i]``; may overwrite logits. A row that fails is reported in
        ``Selection.errors``, never raised."""
        ...


class RequestSampler(TokenSelector, Protocol):
    """The TokenSelector of all requests that bring none: it also tells logprobs of prompts."""

    def prompt_logprobs(self, logits: Tensor, next_ids: Sequence[int], num: int) -> Iterable[dict[int, Any]]:
        """``logits [N, vocab]`` at N prompt positions -> Logprobs of the next token and the ``num`` best."""
        ...


@runtime_checkable
class ForesightedSelector(Protocol):
    """A TokenSelector that can choose without the host."""

    def choose(self, logits: Tensor, requests: Sequence[Request], num_unknown: int) -> Chosen | None:
        """As ``select``, but nobody waits, and logits stay as they are. None: some row needs the host.

        ``num_unknown``: tokens that each request has beside those in ``tokens``: they are on the device yet.
        """
        ...
