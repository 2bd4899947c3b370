"""A transformers causal language model as a PagedModel: the user's own modules and weights, run as they are.

This file knows transformers models. It knows nothing of blocks, requests or schedules: attention is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paged_core import Attend, EngineDeadError, ModelSpec, PagedModel, UnsupportedModel
from paged_hf.model import compressed
from paged_hf.model.attention import PAGED, CountedAttend
from paged_hf.model.compiled import CompiledRoot
from paged_hf.model.config_facts import (
    eos_token_ids,
    max_length_of,
    refuse_by_config,
    sampling_defaults,
    until_the_cache_forgets,
    unwrapped,
)
from paged_hf.model.embeds import Embeds, takes_embeds
from paged_hf.model.fast_forwards import CreateForward, FastForwards, is_users_own
from paged_hf.model.identity import identity
from paged_hf.model.intercepted import listened_to
from paged_hf.model.probe import probe
from paged_hf.model.reach import Reach
from paged_hf.model.rules import apply_rules
from paged_hf.model.shadow import Shadow
from paged_hf.model.twin_call import TwinCall
from paged_hf.model.watch import WatchedModules
from paged_hf.upstream import is_marked_stateful


class HFPagedModel(PagedModel):
    """Runs ``model`` for the engine without ever writing to it. ``model`` stays usable, by other threads too.

    Raises:
        UnsupportedModel: the model can't run on paged memory; the message says why.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        self.model = model
        self._name = name
        self._base: Any = unwrapped(model)
        self.fast_forwards = FastForwards()
        self._compiled: CompiledRoot | None = None
        self._spec: ModelSpec
        self._embeds = Embeds()
        self._takes_embeds: bool | None  # None: not known yet
        self._behind = False  # whether a noticed change has not been taken in yet
        self._told: str | None = None  # the last fingerprint
        self._take_in()

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def counts_padding(self) -> bool:
        """Whether stock counts the padding of a left-padded row as positions. Then stock's answer for such a row
        differs from its answer for the row alone, and from ours."""
        return not self._call.takes_positions and not any(layer.has_key_bias for layer in self._spec.layers)

    @property
    def embedding_dtype(self) -> torch.dtype:
        """The dtype that ``acquire_ids`` takes."""
        dtype: torch.dtype = self._base.get_input_embeddings().weight.dtype
        return dtype

    def acquire_ids(self, embeds: Tensor) -> list[int]:
        """Take ``embeds [n, hidden]`` for a prompt. Returns token ids that stand for them, until ``release_ids``.

        Raises:
            UnsupportedModel: the model computes something else from embeddings than from token ids.
        """
        if self._takes_embeds is None:
            self._takes_embeds = takes_embeds(self._base)
        if not self._takes_embeds:
            raise UnsupportedModel("it makes more of token ids than embeddings")
        return self._embeds.acquire(embeds)

    def release_ids(self, token_ids: Sequence[int]) -> None:
        """Forget the embeddings that they stand for."""
        self._embeds.release(token_ids)

    def knows(self, token_id: int) -> bool:
        """Whether the id stands for an embedding."""
        return token_id in self._embeds

    @property
    def replayable(self) -> bool:
        """Whether forward passes only work on the device. Users' hooks and forwards are Python; and with prompts of
        embeddings, the host reads the token ids, though no decode step needs it."""
        return self._unheard and not self._embeds

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend, sample_indices: Tensor) -> Tensor:
        """``token_ids i64 [T], positions i64 [T], sample_indices i64 [S] -> logits [S, vocab]``"""
        step = CountedAttend(attend, positions)
        rows = sample_indices if sample_indices.numel() else sample_indices.new_zeros(1)  # some heads fail on zero rows
        logits = self._call(token_ids, positions, step, rows, self._compiled)
        if step.layer != len(self._spec.layers):
            raise RuntimeError(f"attention was called {step.layer} times, not {len(self._spec.layers)}")
        return logits[: sample_indices.numel()]

    compilable = True

    @property
    def compiled(self) -> bool:
        return self._compiled is not None

    def compile_forward(self, wanted: bool) -> None:
        """Run the twin through torch.compile from the next call on, or no longer. Prompts of embeddings run
        uncompiled."""
        self.fast_forwards.let_go()
        self.fast_forwards.create = None
        self._compiled = CompiledRoot(self.shadow.root) if wanted else None

    def accelerate(self, create: CreateForward) -> int:
        """Replace forwards of the twin's modules by ``create``, parents before children. Returns how many were
        replaced.

        Raises:
            EngineDeadError: the previous engine has freed weights.
        """
        self.fast_forwards.ask_anew(create)
        if self.fast_forwards.owned:
            self._watch = WatchedModules(())  # its references would keep packed weights alive
        self.fast_forwards.place(self.shadow.root)
        if self.fast_forwards.owned and not self.fast_forwards.released:
            self._look()
        return len(self.fast_forwards)

    def hand_over(self) -> None:
        self.fast_forwards.owned = True

    def fingerprint(self) -> str | None:
        """None: users' hooks and forwards may compute anything, and so may a model that changes by itself."""
        known = self._unheard and self._reach.whole and not self._restless
        if not self.fast_forwards.released:
            self._told = identity(self._base, self._reach) if known else None
        return self._told

    def refresh(self) -> bool:
        """Take in changes of the user's model. True: K/V computed before are invalid.

        Raises:
            UnsupportedModel: the changed model can't run on paged memory.
            EngineDeadError: it has become another model (dtype, device, vocabulary): this needs a new engine.
        """
        news = self._news()
        if news == "retyped":
            self._take_in_again()
            return True
        self._behind |= news is not None
        for twin, forward in list(self.fast_forwards.items()):
            asked = self._behind or not forward.follows_module
            if asked and forward.stale():
                self._behind = True
                self.fast_forwards.replace(twin)
        changed, self._behind = self._behind, False
        return changed or self._restless

    def _news(self) -> Literal["retyped", "changed"] | None:
        """Of a model whose weights are packed and freed nothing is asked: nobody else has it, and it could not be taken
        in again. What it shares with other models, such as a library's registries, may change without it."""
        if self.fast_forwards.released:
            return None
        return "retyped" if self._reach.changed() else self._watch.news()

    def _take_in_again(self) -> None:
        before = self._spec
        try:
            self._take_in()
            if self._spec != before:
                raise EngineDeadError(f"the model has changed since the engine was built: {before} became {self._spec}")
        except Exception:
            self._spec = before
            self._watch.distrust()
            raise
        if self.fast_forwards.create is not None:
            self.accelerate(self.fast_forwards.create)
        if self._compiled is not None:
            self._compiled = CompiledRoot(self.shadow.root)

    def _take_in(self) -> None:
        compressed.widen(self._base)
        self.shadow = Shadow(self._base)
        self._call = TwinCall(self._base, self.shadow, self._embeds)
        self._look()
        self._unheard = not any(is_users_own(module) and not _aligned(module) for module in self._base.modules())
        self.fast_forwards.forget()
        self._takes_embeds = None
        config = self._base.config.get_text_config()
        refuse_by_config(self._base)
        max_length = max_length_of(self._base, config)
        takes_positions = self._call.takes_positions
        placed = apply_rules(self.shadow, self._call.under_way, max_length, takes_positions)
        if not (takes_positions or placed):
            raise UnsupportedModel(f"{type(self._base).__name__}.forward takes no position_ids")
        if is_marked_stateful(self._base):
            raise UnsupportedModel(f"{type(self._base).__name__} keeps state outside attention")
        device = self._base.get_input_embeddings().weight.device
        if device.type == "meta":
            raise UnsupportedModel("its embeddings are offloaded, and the engine wants them on a device")
        found = probe(self.shadow, self._call, self._call.as_stock, config.vocab_size, device)
        self._restless = self._settle(device) or not self._reach.whole
        self._spec = ModelSpec(
            layers=found.layers,
            vocab_size=found.vocab_size,
            max_model_len=min(max_length, found.max_length, until_the_cache_forgets(config, found.layers)),
            dtype=found.dtype,
            device=device,
            eos_token_ids=eos_token_ids(self._base),
            name=self._name or self._base.config.name_or_path or config.model_type,
            sampling_defaults=sampling_defaults(self._base),
        )

    def _look(self) -> None:
        """Record all state that a forward can read."""
        self._reach = Reach(self._base)
        self._watch = WatchedModules(self._reach.modules)

    def _settle(self, device: torch.device) -> bool:
        """Whether forward passes change what they can read. State that only the first pass makes, such as a table,
        exists now; state that each pass writes, such as a counter, is no longer compared."""
        if self._reach.changed() is None:
            return False
        self._look()
        ids = torch.zeros(3, dtype=torch.int64, device=device)
        self.shadow.use_attention(None)
        self._call(ids, torch.arange(3, device=device), None)
        self.shadow.use_attention(PAGED)
        return self._reach.settle()


def _aligned(module: nn.Module) -> bool:
    """Whether only accelerate's hooks come before the module's own forward, with the weights where they are used."""
    return getattr(getattr(module, "_hf_hook", None), "offload", None) is False and not listened_to(module)
