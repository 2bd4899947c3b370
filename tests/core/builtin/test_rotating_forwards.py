"""Attention modules whose rotation is computed by us: the same answers, as long as the rotation is the one we know."""

import pytest
import torch

from modules_to_accelerate import (
    DTYPES,
    TOLERANCE,
    Attention,
    ask,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Rotating(Attention):
    def forward(self, x, cos, sin, scale=1.0):
        q, k, v = (p(x).view(*x.shape[:-1], -1, 32).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        before = q.clone()
        rotated, k = apply_rotary_pos_emb(q, k, cos, sin)
        assert torch.equal(q, before)
        return rotated * scale, k, v


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_attention_module_rotates_as_before_and_its_children_are_asked_for_too(dtype):
    module = Rotating().to(dtype)
    forward = ask(module)
    assert forward.calls_children and ask(module.q_proj) and not forward.stale()
    for batch, tokens in ((1, 1), (1, 37), (2, 3)):
        x, cos, sin = (torch.randn(batch, tokens, n).to(dtype) for n in (48, 32, 32))
        with torch.inference_mode():
            for ours, theirs in zip(forward(x, cos, sin, scale=0.5), module(x, cos, sin, scale=0.5), strict=True):
                torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_rotation_that_someone_puts_in_place_of_the_old_one_makes_the_forward_stale(monkeypatch):
    forward = ask(Rotating())
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    assert forward.stale() and ask(Rotating()) is None
