"""The roles of the execution side: what a model, an attention backend and a token selector must do, and what they may.

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
    """Stores this step's K/V of one layer, then attends over all that the block tables hold."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        """``q [T,H,D], k [T,K,D], v [T,K,Dv], sinks [H], key_bias f32 [H,P] -> [T,H,Dv]``; called once for each layer
        a step. P is no less than ``max_model_len``."""
        ...


class ModuleForward(Role):
    """Stands in for a module's ``forward``: same arguments, same meaning. A plain function is one, too."""

    follows_module: bool = False
    """Whether only changes of the module (weights, attributes, children) make it stale: a model that watches these
    itself asks only after one."""
    calls_children: bool = False
    """Whether it calls the module's children, which are then asked for too."""
    quantized: bool = False
    """Whether it computes with weights that EngineConfig.weights asks for."""

    @abstractmethod
    def __call__(self, *args: Any, **named: Any) -> Any: ...

    def stale(self) -> bool:
        """Whether it means something else than the module by now."""
        return False

    def release(self) -> bool:
        """Take weights that it has a copy of from the module: nobody else needs them. Returns whether there were
        any."""
        return False


class PagedModel(Role):
    """A causal language model that leaves K/V memory and attention to the engine."""

    @property
    @abstractmethod
    def spec(self) -> ModelSpec: ...

    @abstractmethod
    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend, sample_indices: Tensor) -> Tensor:
        """``token_ids i64 [T], positions i64 [T], sample_indices i64 [S] -> logits [S, vocab]`` (any float dtype).

        Several requests' tokens stand packed one after another; which belongs to which is attend's business.
        """

    num_ranks: int = 1
    """Over how many processes it is split. Each calls ``forward`` with the same tokens; rank 0's logits are whole."""

    def refresh(self) -> bool:
        """Called when the engine wakes from idleness. True: the weights changed since, cached K/V are worthless."""
        return False

    @property
    def replayable(self) -> bool:
        """Whether ``forward`` does nothing in Python that no CUDA graph repeats, as hooks of the model's users do.
        When that changes for good, ``refresh`` returns True."""
        return True

    def fingerprint(self) -> str | None:
        """Which model it is: equal only for those that compute the same K/V. It is of all weights and settings, and of
        the code that reads them (``paged_core.fingerprint`` helps), and may take as long as reading all weights. None:
        it can't be told, and its K/V are kept no longer than the process."""
        return None

    def knows(self, token_id: int) -> bool:
        """Whether the id, which is none of the vocabulary's, may stand in prompts: for an embedding, say."""
        return False

    def accelerate(self, create: Callable[[torch.nn.Module], Any]) -> int:
        """Ask ``create`` once for each submodule; run what it answers (a ModuleForward) in its place, in the engine's
        steps only. Returns how many were taken."""
        return 0

    def hand_over(self) -> None:
        """Called before ``accelerate`` by an engine that alone has the model: weights that a faster forward has copied
        needn't be kept. What ``fingerprint`` has told before, it tells ever after."""

    compilable: bool = False
    """Whether the model can run its modules through torch.compile. It is then called with an ``attend`` that a
    compiled graph may call. What the compiler can't do, the model does without."""

    @property
    def compiled(self) -> bool:
        return False

    def compile_forward(self, wanted: bool) -> None:
        """Compile with the next call of ``forward``, or no longer. Faster forwards are then gone."""
        raise NotImplementedError("it isn't compilable")


class AttentionBackend(Role):
    """Attention over paged K/V. Planned once a step, run once a layer."""

    name: str

    reads_scales: bool = False
    """Whether it stores and reads quantised caches with their scales; else it isn't given such a cache."""
    capturable: bool = False
    """Whether ``plan`` and ``run`` never wait for the device: decode steps are then replayed as CUDA graphs, where a
    row of padding has a ``seq_lens`` of 0 and ``max_seq_len`` is a bound."""

    @property
    def num_compiles(self) -> int:
        """Kernels compiled so far. After warm_up there should be no more."""
        return 0

    def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        """Called once, while the engine is built, so that no request waits for what can be made now.
        ``progress(what, done, total)``."""

    @abstractmethod
    def plan(self, metadata: AttentionMetadata) -> None:
        """Take in this step's shape; metadata tensors live on the CPU unless the model's device differs."""

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
        """Store k, v at the planned slots, then attend: ``q [T,H,D] -> [T,H,Dv]`` in q's dtype.

        ``key_bias f32 [H,P]`` is passed for layers with ``has_key_bias`` only.
        """

    def replay_key(self, cache: KVCache) -> Hashable | None:
        """Equal as long as ``run`` launches the same for tensors that lie at the same addresses, whatever ``plan`` was
        given: such launches may be made again without asking ``run``. None: they may not."""
        return None

    @abstractmethod
    def copy_blocks(self, cache: KVCache, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) in every layer, in order: copy-on-write."""


class Chosen(Protocol):
    """The next tokens of some rows, which the host may not know yet."""

    token_ids: Tensor  # int64 [S]

    def keep(self, rows: Sequence[int]) -> Chosen:
        """Those rows only."""
        ...

    def fetch(self) -> Selection:
        """Wait for them."""
        ...


class TokenSelector(Role):
    """Logits of some rows in, the next token of each out."""

    @abstractmethod
    def select(self, logits: Tensor, requests: Sequence[Request]) -> Selection:
        """``logits [S, vocab]``, row i for ``requests[i]``; may overwrite logits. A row that fails is reported in
        ``Selection.errors``, never raised."""

    def choose(self, logits: Tensor, requests: Sequence[Request], num_unknown: int) -> Chosen | None:
        """As ``select``, but nobody waits, and logits stay as they are. None: some row needs the host.

        ``num_unknown``: tokens that each request has beside those in ``tokens``: they are on the device yet.

        Whoever overrides ``select`` overrides this too, or isn't asked it.
        """
        return None


class RequestSampler(TokenSelector):
    """The TokenSelector of all requests that bring none: it also tells logprobs of prompts."""

    @abstractmethod
    def prompt_logprobs(self, logits: Tensor, next_ids: Sequence[int], num: int) -> Iterable[Mapping[int, Any]]:
        """``logits [N, vocab]`` at N prompt positions -> Logprobs of the next token and the ``num`` best."""
