"""Answers a generate() call by stock and by the patched model, and compares everything that a caller could notice.

This file knows generate() and its outputs. It knows nothing of models: the tests bring them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from paged_hf.model.rounding import narrow_dtype
from rounded_parity import Rounded

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
Options = dict[str, Any]
# Values that many tests of the contract use.
ENDS = list(range(5, 96, 9))  # one token in nine ends a row
FULL: Options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SHORT: Options = {"max_new_tokens": 7, "pad_token_id": 0}


@dataclass
class Answer:
    """Everything of a call that its caller can see."""

    result: Any = None
    error: BaseException | None = None
    warnings: list[tuple[type[Warning], str]] = field(default_factory=list)
    new_threads: set[threading.Thread] = field(default_factory=set)  # threads that the call has left running
    random_state: Tensor = field(default_factory=lambda: torch.empty(0))
    seen: list[Any] = field(default_factory=list)  # what the caller's objects were shown by generate()
    num_compared: int = 0  # tokens that had to be equal, if 16-bit weights leave some open


class Watcher:
    """Base of the caller's objects. They record what they are shown, for ``Answer.seen``."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def note(self, *tensors: Any) -> None:
        self.seen.append(tuple(t.clone() if isinstance(t, Tensor) else t for t in tensors))


class Recorder(Watcher, LogitsProcessor):
    """A processor with state: it lowers the scores of what each row chose before, more with each call."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids, scores)
        return scores.scatter(1, input_ids, scores.gather(1, input_ids) - 0.3 * len(self.seen))


class EndsAtTurns(Watcher, StoppingCriteria):
    """Ends row i of the call at step 2 i + 2. It counts the steps itself."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.note(input_ids, *(scores or ()))
        return torch.arange(len(input_ids)) * 2 + 2 <= len(self.seen)


class RecordingStreamer(Watcher, BaseStreamer):
    def put(self, value: Tensor) -> None:
        self.note(value)

    def end(self) -> None:
        self.note("end")


def answer(generate: Callable[..., Any], args: tuple[Any, ...], options: Options, seed: int = 0) -> Answer:
    found = Answer()
    torch.manual_seed(seed)
    before = set(threading.enumerate())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found.result = generate(*args, **options)
        except Exception as error:
            found.error = error
    found.warnings = [(warning.category, str(warning.message)) for warning in caught]
    found.new_threads = set(threading.enumerate()) - before
    found.random_state = torch.get_rng_state()
    found.seen = [things for watcher in _watchers(options) for things in watcher.seen]
    return found


def assert_same(
    patched: Any,
    *args: Any,
    tier: str | None,
    loop: str | None = None,
    seed: int = 0,
    fresh: Callable[[], Options] = dict,  # makes objects that a call changes; called for each way
    **options: Any,
) -> Answer:
    """Assert that both ways of one call give the same, and that ours was answered by ``tier`` (None: it raises before
    that).

    For 16-bit weights, scores that are closer than their rounding may be chosen differently: see ``Rounded``."""
    expected = answer(patched.stock, args, {**options, **fresh()}, seed)
    forget_reports()
    got = answer(patched, args, {**options, **fresh()}, seed)
    if expected.error is None and got.error is not None:
        raise got.error
    assert repr(got.error) == repr(expected.error)
    assert got.warnings == expected.warnings
    assert not got.new_threads
    if expected.error is not None or narrow_dtype(patched.model) is None:
        _assert_same_numbers(got, expected)
    else:
        rounded = Rounded.of(patched.stock, *args, seed=seed, fresh=fresh, **options)
        _assert_rounded_numbers(got, expected, rounded)
    _assert_answered_by(patched.last_report(), tier, loop, expected.error)
    return got


def _assert_same_numbers(got: Answer, expected: Answer) -> None:
    assert torch.equal(got.random_state, expected.random_state), "the call has left other random numbers behind"
    assert_alike(got.result, expected.result, "result")
    assert_alike(got.seen, expected.seen, "seen")


def _assert_rounded_numbers(got: Answer, expected: Answer, rounded: Rounded) -> None:
    rounded.assert_output(got.result, "result")
    got.num_compared = rounded.compared
    assert _outline(got.result) == _outline(expected.result)
    if torch.equal(_sequences(got.result), _sequences(expected.result)):  # otherwise the numbers of steps may differ
        assert torch.equal(got.random_state, expected.random_state), "the call has left other random numbers behind"
        assert _outline(got.seen) == _outline(expected.seen)


def _sequences(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.sequences


def _outline(thing: Any) -> Any:
    """Return the structure of a result, down to the dtypes."""
    if isinstance(thing, dict):
        return type(thing), {key: _outline(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing), [_outline(each) for each in thing]
    return (type(thing), thing.dtype, thing.ndim) if isinstance(thing, Tensor) else type(thing)


def _assert_answered_by(report: Any, tier: str | None, loop: str | None, error: BaseException | None) -> None:
    if tier is None:
        assert report is None and error is not None, report
    else:
        assert report is not None
        assert (report.tier, report.loop) == (tier, loop or report.loop), report


def forget_reports() -> None:
    from paged_hf.generate import report

    report._latest.report = None


def assert_alike(got: Any, expected: Any, where: str) -> None:
    """Assert the same structure of the same types. Numbers must be equal, or close if they are computed."""
    assert type(got) is type(expected), f"{where}: {type(got)} instead of {type(expected)}"
    if isinstance(expected, Tensor):
        assert got.shape == expected.shape, f"{where}: {list(got.shape)} instead of {list(expected.shape)}"
        torch.testing.assert_close(got, expected, **CLOSE, equal_nan=True, msg=lambda m: f"{where}: {m}")
        for fact in ("is_contiguous", "is_inference"):
            assert getattr(got, fact)() == getattr(expected, fact)(), f"{where}.{fact}()"
        assert got.requires_grad == expected.requires_grad, where
    elif isinstance(expected, Cache):
        assert_same_cache(got, expected, where)
    elif isinstance(expected, dict):
        assert list(got) == list(expected), where
        for key in expected:
            assert_alike(got[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), f"{where}: {len(got)} instead of {len(expected)}"
        for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            assert_alike(ours, theirs, f"{where}[{i}]")
    else:
        assert got == expected, where


def assert_same_cache(got: Cache, expected: Cache, where: str = "cache") -> None:
    """Assert the same kind and length, layer by layer. The contents are compared by continuing from the cache."""
    if isinstance(expected, EncoderDecoderCache):
        assert_same_cache(got.self_attention_cache, expected.self_attention_cache, where)
        assert_same_cache(got.cross_attention_cache, expected.cross_attention_cache, where)
        return
    assert [type(layer) for layer in got.layers] == [type(layer) for layer in expected.layers], where
    for ours, theirs in zip(got.layers, expected.layers, strict=True):
        if getattr(theirs, "keys", None) is None:  # a recurrent state
            continue
        assert ours.get_seq_length() == theirs.get_seq_length(), where
        for mine, its in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert (mine.shape, mine.dtype, mine.device) == (its.shape, its.dtype, its.device), where
            real = mine.ne(0).any(-1)  # stock also keeps the K/V of padding
            torch.testing.assert_close(mine[real], its[real], **CLOSE, msg=lambda m: f"{where}: {m}")


def _watchers(options: Options) -> list[Watcher]:
    found = []
    for value in options.values():
        found += [thing for thing in (value if isinstance(value, list) else [value]) if isinstance(thing, Watcher)]
    return found


def padded(rows: list[list[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Return ``i64 [B,L]`` with padding on the left, and its attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def some_rows(lengths: tuple[int, ...], vocab_size: int = 90, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return padded([torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths])
