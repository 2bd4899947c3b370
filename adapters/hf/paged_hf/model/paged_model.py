"""A transformers causal language model as a PagedModel: the user's own modules and weights, run as they are.

This file knows transformers models. It knows nothing of blocks, requests or schedules: attention is handed in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paged_core import Attend, EngineDeadError, ModelSpec, ModuleForward, PagedModel, UnsupportedModel
from paged_hf.model import compressed
from paged_hf.model.attention import PAGED, UNDER_WAY, CountedAttend
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
from paged_hf.model.identity import identity
from paged_hf.model.intercepted import listened_to
from paged_hf.model.probe import probe
from paged_hf.model.reach import Reach
from paged_hf.model.rules import apply_rules
from paged_hf.model.shadow import Shadow
from paged_hf.model.state import state_outside_attention
from paged_hf.model.watch import WatchedModules
from paged_hf.upstream import cache_in_result, is_marked_stateful

CreateForward = Callable[[nn.Module], Any]  # a ModuleForward, or what does as one; None: the module stays


class HFPagedModel(PagedModel):
    """Runs ``model`` for the engine without ever writing to it. ``model`` stays usable, by other threads too.

    Raises:
        UnsupportedModel: the model can't run on paged memory; the message says why.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        self.model = model
        self._name = name
        self._base: Any = unwrapped(model)
        self._fast: dict[nn.Module, ModuleForward] = {}  # by twin
        self._compiled: CompiledRoot | None = None
        self._spec: ModelSpec
        self._create: CreateForward | None = None
        self._embeds = Embeds()
        self._takes_embeds: bool | None  # None: not known yet
        self._behind = False  # whether a change was noticed and isn't caught up with
        self._owned = self._released = False
        self._told: str | None = None  # the last fingerprint
        self._take_in()

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def counts_padding(self) -> bool:
        """Whether stock numbers the tokens of a left-padded row with its padding: such a row then gets another answer
        from stock than it gets alone, and than it gets here."""
        return not self._takes_positions and not any(layer.has_key_bias for layer in self._spec.layers)

    @property
    def embedding_dtype(self) -> torch.dtype:
        """What ``acquire_ids`` takes."""
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
        """Whether forward passes are nothing but work on the device. Users' hooks and forwards are Python; and prompts
        that bring embeddings have token ids looked at by the host, though no decode step needs it."""
        return self._unheard and not self._embeds

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend, sample_indices: Tensor) -> Tensor:
        """``token_ids i64 [T], positions i64 [T], sample_indices i64 [S] -> logits [S, vocab]``"""
        step = CountedAttend(attend, positions)
        rows = sample_indices if sample_indices.numel() else sample_indices.new_zeros(1)  # some heads refuse no rows
        logits = self._call(token_ids, positions, step, rows, self._compiled)
        if step.layer != len(self._spec.layers):
            raise RuntimeError(f"attention was called {step.layer} times, not {len(self._spec.layers)}")
        return logits[: sample_indices.numel()]

    compilable = True

    @property
    def compiled(self) -> bool:
        return self._compiled is not None

    def compile_forward(self, wanted: bool) -> None:
        """Run the twin through torch.compile from the next call on, or no longer. Prompts that bring embeddings run
        without."""
        self._let_go()
        self._create = None
        self._compiled = CompiledRoot(self.shadow.root) if wanted else None

    def accelerate(self, create: CreateForward) -> int:
        """Let ``create`` stand in for modules of the twin, parents before children. Returns how many it took.

        Raises:
            EngineDeadError: the engine before this one has let weights go.
        """
        if self._released:
            raise EngineDeadError("an engine has packed this model's weights and let them go; load it anew")
        self._create = create
        self._let_go()
        if self._owned:
            self._watch = WatchedModules(())  # through it, weights that are packed would stay to the end
        self._ask(self.shadow.root)
        if self._owned:
            self._look()
        return len(self._fast)

    def hand_over(self) -> None:
        self._owned = True

    def fingerprint(self) -> str | None:
        """None: users' hooks and forwards may compute anything, and so may a model that changes by itself."""
        known = self._unheard and self._reach.whole and not self._restless
        if not self._released:
            self._told = identity(self._base, self._reach) if known else None
        return self._told

    def refresh(self) -> bool:
        """Catch up with what was done to the user's model. True: K/V computed before are worthless.

        Raises:
            UnsupportedModel: it can't run on paged memory any more.
            EngineDeadError: it has become another model (dtype, device, vocabulary): this needs a new engine.
        """
        news = "retyped" if self._reach.changed() else self._watch.news()
        if news == "retyped":
            self._take_in_again()
            return True
        self._behind |= news is not None
        for twin, forward in list(self._fast.items()):
            asked = self._behind or not forward.follows_module
            if asked and forward.stale():
                self._behind = True
                self._replace(twin)
        changed, self._behind = self._behind, False
        return changed or self._restless

    def _let_go(self) -> None:
        """Forwards of another engine, over the same model."""
        for twin in self._fast:
            twin.__dict__.pop("forward", None)
        self._fast = {}

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
        if self._create is not None:
            self.accelerate(self._create)
        if self._compiled is not None:
            self._compiled = CompiledRoot(self.shadow.root)

    def _take_in(self) -> None:
        compressed.widen(self._base)
        self.shadow = Shadow(self._base)
        self._under_way: list[CountedAttend | None] = [None]
        self.shadow.give_all(UNDER_WAY, self._under_way)
        self._look()
        self._unheard = not any(_listened_to(module) and not _aligned(module) for module in self._base.modules())
        self._fast = {}
        self._takes_embeds = None
        config = self._base.config.get_text_config()
        refuse_by_config(self._base)
        max_length = max_length_of(self._base, config)
        parameters = inspect.signature(type(self._base).forward).parameters
        self._takes_positions = "position_ids" in parameters
        placed = apply_rules(self.shadow, self._under_way, max_length, self._takes_positions)
        if not (self._takes_positions or placed):
            raise UnsupportedModel(f"{type(self._base).__name__}.forward takes no position_ids")
        if is_marked_stateful(self._base):
            raise UnsupportedModel(f"{type(self._base).__name__} keeps state outside attention")
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        device = self._base.get_input_embeddings().weight.device
        if device.type == "meta":
            raise UnsupportedModel("its embeddings are offloaded, and the engine wants them on a device")
        found = probe(self.shadow, self._call, self._as_stock, config.vocab_size, device)
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
        """Remember all that a forward can read."""
        self._reach = Reach(self._base)
        self._watch = WatchedModules(self._reach.modules)

    def _settle(self, device: torch.device) -> bool:
        """Whether forward passes change what they can read. What only the first one made, such as a table, is there
        now; what each of them writes, such as a counter, is compared no longer."""
        if self._reach.changed() is None:
            return False
        self._look()
        ids = torch.zeros(3, dtype=torch.int64, device=device)
        self.shadow.use_attention(None)
        self._call(ids, torch.arange(3, device=device), None)
        self.shadow.use_attention(PAGED)
        return self._reach.settle()

    @torch.no_grad()
    def _as_stock(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """``token_ids i64 [B,T], positions i64 [T] -> logits [B,T,vocab]``, over a cache that the model makes itself.

        Raises:
            UnsupportedModel: it keeps state outside attention.
        """
        options: dict[str, Any] = {"input_ids": token_ids, "attention_mask": None}
        if self._takes_positions:
            options["position_ids"] = positions.expand_as(token_ids)
        try:
            output = self.shadow.root(**options, use_cache=True)
        except Exception:  # if that is no fault of the cache, the next call says so
            output = self.shadow.root(**options, use_cache=False)
        place = state_outside_attention(cache_in_result(output))
        if place is not None:
            raise UnsupportedModel(f"{type(self._base).__name__} keeps state outside attention, in {place}")
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def _call(
        self,
        token_ids: Tensor,
        positions: Tensor,
        step: CountedAttend | None,
        rows: Tensor | None = None,
        compiled: CompiledRoot | None = None,
    ) -> Tensor:
        """One forward pass of the twin over ``token_ids i64 [T]``: logits of ``rows``, or of all."""
        ids = token_ids[None]
        self._under_way[0] = step
        options: dict[str, Any] = {"attend": step} if step is not None and self._takes_kwargs else {}
        if self._takes_positions:
            options["position_ids"] = positions[None]
        if rows is not None and self._keeps_logits:
            options["logits_to_keep"] = rows
        if self._embeds.among(token_ids):
            embedding = self.shadow.twin_of(self._base.get_input_embeddings())
            compiled = None
            options["inputs_embeds"] = self._embeds.of(token_ids, embedding)[None]
        else:
            options["input_ids"] = ids
        options |= {"attention_mask": None, "use_cache": False}
        try:
            if compiled is not None and step is not None:
                output = compiled(step.rewind, **options)
            else:
                output = self.shadow.root(**options)
        finally:
            self._under_way[0] = None  # through it, the cache of an engine that is gone would live on
        logits: Tensor = output.logits[0]
        return logits if rows is None or self._keeps_logits else logits[rows]

    def _ask(self, twin: nn.Module) -> None:
        if not self._replace(twin) or self._fast[twin].calls_children:
            children = list(twin.children())
            for child in children:
                self._ask(child)
            self._release(child for child in children if not child._modules)  # siblings are packed together
        else:
            self._release([twin] if twin._modules else [])

    def _release(self, twins: Iterable[nn.Module]) -> None:
        if self._owned:
            for twin in twins:
                if twin in self._fast:
                    self._released |= self._fast[twin].release()

    def _replace(self, twin: nn.Module) -> bool:
        """Ask for a faster forward of one module. What the user changed himself, or listens to, stays as it is."""
        if twin in self._fast:
            del self._fast[twin], twin.__dict__["forward"]
        assert self._create is not None
        if "forward" in twin.__dict__ or any(_listened_to(part) for part in twin.modules() if part is not twin):
            return False
        forward = self._create(twin)
        if forward is not None:
            self._fast[twin], twin.__dict__["forward"] = ModuleForward.of(forward), forward
        return forward is not None


def _listened_to(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return listened_to(module) or not (forward is None or compressed.is_librarys(forward))


def _aligned(module: nn.Module) -> bool:
    """Whether all that stands before the module's own forward is accelerate's, with the weights where they are used."""
    return getattr(getattr(module, "_hf_hook", None), "offload", None) is False and not listened_to(module)
