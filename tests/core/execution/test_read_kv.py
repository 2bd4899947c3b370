"""Engine.read_kv: copies of what the cache holds of a request."""

import pytest
import torch

from growing_engine import BLOCK, Copying, make_engine, prompt_of, run
from paged_core import (
    InvalidRequestError,
)
from tiny_engine import greedy
from tiny_model import TinyModel


def dense_kv(model, tokens):
    """Each layer's (k, v) of a plain run: ``[K, n, D]``."""

    def attend(layer, q, k, v, sinks=None):
        held.append((k.transpose(0, 1), v.transpose(0, 1)))
        return model.dense(layer, q, k, v)

    held = []
    model.forward(torch.tensor(tokens), torch.arange(len(tokens)), attend, torch.tensor([0]))
    return held


def assert_same_kv(found, wanted, first=0):
    for pair, truth in zip(found, wanted, strict=True):
        for mine, theirs in zip(pair, truth, strict=True):
            assert mine.shape == theirs.shape
            assert not mine[:, :first].any()
            torch.testing.assert_close(mine[:, first:], theirs[:, first:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_read_of_a_request_is_what_a_dense_run_holds(backend):
    model = TinyModel()
    engine = make_engine(model, attention_backend=backend)
    prompt = prompt_of(21)
    engine.add_request("before", prompt, greedy(3))
    run(engine)
    rows = engine.add_request("a", prompt, greedy(30, n=2))  # begins with cached blocks, forks
    (waiting,) = engine.add_request("b", prompt_of(9, seed=1), greedy(5))
    assert [k.shape for k, _ in engine.read_kv(waiting)] == [(2, 0, 16)] * 2
    for _ in range(6):
        engine.step()
        for row in rows:
            assert row.num_computed == len(row.tokens) - 1
            assert_same_kv(engine.read_kv(row), dense_kv(model, row.tokens[:-1]))


def test_positions_behind_every_window_read_as_zeros():
    model = TinyModel(window=10)
    engine = make_engine(model, plugins=[Copying()])
    (row,) = engine.add_request("a", prompt_of(21), greedy(20))
    for _ in range(8):
        engine.step()
    given_back = (row.num_computed + 1 - 10) // BLOCK * BLOCK
    assert given_back > 12
    assert_same_kv(engine.read_kv(row), dense_kv(model, row.tokens[:-1]), first=given_back)


def test_what_was_read_is_the_readers_own():
    engine = make_engine()
    (row,) = engine.add_request("a", prompt_of(21), greedy(20))
    with torch.inference_mode():
        engine.step()
        read = [tensor for pair in engine.read_kv(row) for tensor in pair]
    assert all(t.is_contiguous() and not t.is_inference() and not t.requires_grad for t in read)
    for tensor in read:
        tensor.fill_(5)
    run(engine)
    assert row.output_token_ids == TinyModel().generate(prompt_of(21), 20)
    engine.release_memory()
    assert all(tensor.eq(5).all() for tensor in read)


def test_reading_a_request_that_has_ended_is_refused_with_the_way_out():
    engine = make_engine()
    (row,) = engine.add_request("a", prompt_of(5), greedy(2))
    run(engine)
    with pytest.raises(InvalidRequestError, match=r"'a' has ended.*holds"):
        engine.read_kv(row)
