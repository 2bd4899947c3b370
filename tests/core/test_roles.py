"""Roles: what is optional in an object that others bring, and that strangers need no base class of ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from alphabet_model import AlphabetModel
from paged_core import (
    AttentionBackend,
    Engine,
    EngineConfig,
    ModuleForward,
    PagedModel,
    RequestSampler,
    SamplingParams,
    Selection,
    TokenSelector,
)
from paged_core.builtin.attention import CpuBackend, ReferenceBackend
from paged_core.builtin.triton_attention import TritonBackend
from paged_core.engine.selection import OneByOne
from paged_core.sampling.beam_search import BeamSearch
from paged_core.sampling.sampler import Greedy, Sampler


class Gather:
    """A stranger's backend: it has what must be there, and an ability of its own."""

    name = "gather"
    capturable = True

    def plan(self, metadata: Any) -> None: ...

    def run(self, *given: Any) -> str:
        return "ran"

    def copy_blocks(self, cache: Any, pairs: Any) -> None: ...


def test_what_a_strangers_object_lacks_is_as_its_role_has_it() -> None:
    mine = Gather()
    backend = AttentionBackend.of(mine)
    assert (backend.name, backend.run(0, *[torch.empty(0)] * 3, None)) == ("gather", "ran")  # type: ignore[arg-type]
    assert (backend.capturable, backend.reads_scales, backend.num_compiles) == (True, False, 0)
    backend.warm_up(lambda *told: pytest.fail("there is nothing to do"))
    mine.num_compiles = 3  # type: ignore[attr-defined]
    assert backend.num_compiles == 3
    assert AttentionBackend.of(backend) is backend and copy.copy(backend).name == "gather"
    assert not ModuleForward.of(len).stale()


def test_what_must_be_there_has_no_default() -> None:
    class Half:
        def plan(self, metadata: Any) -> None: ...

    assert not AttentionBackend.is_met_by(Half())
    with pytest.raises(AttributeError, match="'Half' object has no attribute 'copy_blocks'"):
        _ = AttentionBackend.of(Half()).copy_blocks


def test_our_own_inherit_from_their_roles() -> None:
    assert issubclass(Sampler, RequestSampler) and issubclass(OneByOne, RequestSampler)
    assert issubclass(BeamSearch, TokenSelector) and issubclass(Greedy, TokenSelector)
    assert all(issubclass(kind, AttentionBackend) for kind in (CpuBackend, ReferenceBackend, TritonBackend))
    model = AlphabetModel()
    assert not isinstance(model, PagedModel) and PagedModel.is_met_by(model), "a stranger's, for all these tests"


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_strangers_selector_that_cannot_choose_ahead_selects(lookahead: bool) -> None:
    class Second:
        """The token after the likeliest."""

        def select(self, logits: Any, requests: Any) -> Selection:
            return Selection([token + 1 for token in logits.argmax(-1).tolist()])

    engine = Engine(AlphabetModel(), EngineConfig(num_blocks=8, attention_backend="reference", lookahead=lookahead))
    engine.add_request("mine", [33], SamplingParams(max_tokens=3), selector=Second())  # type: ignore[arg-type]
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert tokens == [35, 37, 39]
