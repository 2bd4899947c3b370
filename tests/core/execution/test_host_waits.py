"""How often choosing tokens has the host wait for the device: each fetch drains all work that is under way."""

import pytest
import torch

from paged_core import SamplingParams
from paged_core.execution.waits import NoWaits
from paged_core.sampling.sampler import Sampler
from paged_core.scheduling.request import Request

PLAIN = [SamplingParams(temperature=0)]
EDITED = [
    SamplingParams(temperature=0, logit_bias={3: 2.0}, repetition_penalty=1.2, min_tokens=3, stop_token_ids=[4]),
    SamplingParams(temperature=0, allowed_token_ids=[1, 2, 3], presence_penalty=0.5),
]
DRAWN = [SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_k=700, min_p=0.1), SamplingParams(temperature=0)]


@pytest.mark.parametrize(
    ("params", "waits"),
    [
        (PLAIN, 1),
        (EDITED, 1),
        (DRAWN, 1),
        ([*DRAWN, SamplingParams(top_p=0.05)], 2),  # whether a nucleus is wide
        ([SamplingParams(temperature=0, logprobs=3), *PLAIN], 2),  # the chosen token is among the likeliest
        ([SamplingParams(temperature=0, logprobs=0), *PLAIN], 3),  # its rank is counted
    ],
    ids=["greedy", "edited", "drawn", "nucleus", "logprobs", "rank"],
)
def test_a_batch_is_fetched_at_once_however_many_rows_it_has(params, waits, monkeypatch):
    logits, requests = rows_of(params)
    waited = count_waits(monkeypatch)
    selection = Sampler().select(logits, requests)
    monkeypatch.undo()
    assert not selection.errors
    assert len(waited) == waits, waited


@pytest.mark.parametrize("params", [PLAIN, DRAWN], ids=["greedy", "drawn"])
def test_choosing_ahead_waits_for_nothing(params, monkeypatch):
    logits, requests = rows_of(params)
    waited = count_waits(monkeypatch)
    with NoWaits("cpu"):
        chosen = Sampler().choose(logits, requests, 1).keep(range(1, len(requests)))
    monkeypatch.undo()
    assert not waited
    assert not chosen.fetch().errors


def rows_of(params):
    params = [each for each in params for _ in range(6)]
    requests = [Request(str(i), [5, 6, i], each, seed=i) for i, each in enumerate(params)]
    return torch.randn(len(requests), 2000, generator=torch.Generator().manual_seed(1)), requests


def count_waits(monkeypatch):
    waited = []
    for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _original=original, _name=name, **kwargs):
            waited.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return waited
