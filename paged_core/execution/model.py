"""The roles of the execution side: what a model, an attention backend and a token selector must have, and may have.

Shape letters (docs/kv_layout.md): T tokens this step, R requests, B blocks per table, S sampled rows, L layers,
H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from paged_core.execution.batch import AttentionMetadata
from paged_core.execution.kv_cache import KVCache
from paged_core.execution.spec import ModelSpec
from paged_core.roles import Role
from paged_core.scheduling.request import Request, Selection


class Attend(Protocol):
    """Stores this step's K/V of one layer, then attends to all tokens of the block tables."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        """Compute ``q [T,H,D], k [T,K,D], v [T,K,Dv], sinks [H], key_bias f32 [H,P] -> [T,H,Dv]``. The model calls this
        once per layer and step. P is at least ``max_model_len``."""
        ...


class KeyedAttend(Role):
    """The optional part of an Attend. A plain function lacks it."""

    def replay_key(self) -> Hashable | None:
        """See AttentionBackend.replay_key; the cache is the one that it stores to."""
        return None


class ModuleForward(Role):
    """Replaces a module's ``forward``: same arguments, same result. A plain function is one, too."""

    follows_module: bool = False
    """Whether only changes of the module (its weights, attributes, children) make it stale. A model that watches these
    itself calls ``stale`` only after such a change."""
    calls_children: bool = False
    """Whether it calls the module's children. They are then replaced too, if something is faster."""
    quantized: bool = False
    """Whether it computes with weights quantised as EngineConfig.weights says."""

    @abstractmethod
    def __call__(self, *args: Any, **named: Any) -> Any: ...

    def stale(self) -> bool:
        """Return whether the module has changed so that this no longer computes the same."""
        return False

    def release(self) -> bool:
        """Free the module's weights of which this has a copy, because nothing else needs them. Returns whether there
        were any."""
        return False


class PagedModel(Role):
    """A causal language model that calls the engine for K/V memory and attention."""

    @property
    @abstractmethod
    def spec(self) -> ModelSpec: ...

    @abstractmethod
    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend, sample_indices: Tensor) -> Tensor:
        """Compute ``token_ids i64 [T], positions i64 [T], sample_indices i64 [S] -> logits [S, vocab]`` (any float
        dtype).

        The tokens of several requests are packed one after another; only ``attend`` needs to know which belong
        together.
        """

    num_ranks: int = 1
    """The number of processes that it is split over. Each calls ``forward`` with the same tokens; rank 0's logits are
    complete."""

    def refresh(self) -> bool:
        """Called before the first step after the engine was idle. Returns whether the weights have changed since, so
        that cached K/V are invalid."""
        return False

    @property
    def replayable(self) -> bool:
        """Whether ``forward`` does nothing in Python that a CUDA graph would not repeat, such as calling users' hooks.
        When that changes for good, ``refresh`` returns True."""
        return True

    def fingerprint(self) -> str | None:
        """Return an id that only models which compute the same K/V share. It covers all weights and settings, and the
        code that reads them (``paged_core.fingerprint`` helps), and may take as long as reading all weights. None:
        there is no such id, and K/V are not kept beyond the process."""
        return None

    def knows(self, token_id: int) -> bool:
        """Return whether an id outside the vocabulary may be in prompts, for an embedding for example."""
        return False

    def accelerate(self, create: Callable[[torch.nn.Module], Any]) -> int:
        """Call ``create`` once for each submodule, and run the ModuleForward that it returns in the submodule's place,
        in the engine's steps only. Returns how many submodules were replaced."""
        return 0

    def hand_over(self) -> None:
        """Called before ``accelerate`` by an engine that alone uses the model: weights that a faster forward has copied
        may be freed. ``fingerprint`` must go on returning what it has returned before."""

    compilable: bool = False
    """Whether the model can run its modules through torch.compile. It is then called with an ``attend`` that a compiled
    graph may call. Modules that the compiler can't compile run uncompiled."""

    @property
    def compiled(self) -> bool:
        return False

    def compile_forward(self, wanted: bool) -> None:
        """Compile at the next call of ``forward`` (True), or run uncompiled from now on (False). Faster forwards are
        dropped."""
        raise NotImplementedError("it isn't compilable")


class AttentionBackend(Role):
    """Attention over paged K/V: ``plan`` is called once a step, ``run`` once a layer."""

    name: str

    reads_scales: bool = False
    """Whether it stores and reads quantised caches with their scales. If not, it is never given such a cache."""
    capturable: bool = False
    """Whether ``plan`` and ``run`` never wait for the device. Decode steps are then replayed as CUDA graphs; in these a
    row of padding has a ``seq_lens`` of 0, and ``max_seq_len`` is an upper bound."""

    @property
    def num_compiles(self) -> int:
        """The number of kernels compiled so far. It should not grow after ``warm_up``."""
        return 0

    def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        """Called once, while the engine is built, to compile what requests would wait for. Call ``progress(what, done,
        total)`` meanwhile."""

    @abstractmethod
    def plan(self, metadata: AttentionMetadata) -> None:
        """Take in this step's metadata. Its tensors are on the model's device."""

    @abstractmethod
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
        """Store k and v at the planned slots, then attend: ``q [T,H,D] -> [T,H,Dv]`` in q's dtype.

        ``key_bias f32 [H,P]`` is passed for layers with ``has_key_bias`` only.
        """

    def replay_key(self, cache: KVCache) -> Hashable | None:
        """Return a key that is equal as long as ``run`` makes the same launches for tensors at the same addresses,
        whatever ``plan`` was given. Such launches may be repeated without calling ``run``. None: they may not."""
        return None

    @abstractmethod
    def copy_blocks(self, cache: KVCache, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) in every layer, in this order, for copy-on-write."""


class Chosen(Protocol):
    """The next tokens of some rows, which may be on the device only so far."""

    token_ids: Tensor  # int64 [S]

    def keep(self, rows: Sequence[int]) -> Chosen:
        """Return the same for those rows only."""
        ...

    def fetch(self) -> Selection:
        """Wait for the tokens and return them."""
        ...


class TokenSelector(Role):
    """Chooses the next token of each row from its logits."""

    @abstractmethod
    def select(self, logits: Tensor, requests: Sequence[Request]) -> Selection:
        """Choose from ``logits [S, vocab]``, row i for ``requests[i]``. The logits may be overwritten. A row that fails
        must be reported in ``Selection.errors``, never raised."""

    def choose(self, logits: Tensor, requests: Sequence[Request], num_unknown: int) -> Chosen | None:
        """Do the same as ``select``, but without waiting for the device, and without changing the logits. Return None
        if some row needs the host.

        ``num_unknown``: the number of tokens that each request has beyond those in ``tokens``; they are on the device
        only.

        A subclass that overrides ``select`` must override this too; otherwise ``choose`` is not called.
        """
        return None


class RequestSampler(TokenSelector):
    """The TokenSelector of all requests that bring none. It also computes logprobs of prompts."""

    @abstractmethod
    def prompt_logprobs(self, logits: Tensor, next_ids: Sequence[int], num: int) -> Iterable[Mapping[int, Any]]:
        """Return for ``logits [N, vocab]`` at N prompt positions the Logprobs of the next token and of the ``num`` most
        likely ones."""
