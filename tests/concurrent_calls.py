"""Calls of all kinds to a patched model's generate(), made by many threads at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 48}
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def used_blocks(model: Any) -> int:
    engine = host_of(model).engine
    return engine.memory.num_blocks_used if engine is not None else 0


def host_of(model: Any) -> Any:
    return model.generate.tiers.host


def prompt(seed: int, rows: int = 1) -> dict[str, Tensor]:
    """Return random ids. In a batch each row has another length, and is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, 4 + seed % 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row % 4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run each call in a thread of its own. Returns their results or exceptions."""
    ready = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        ready.wait(60)
        try:
            return call()
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(120) for future in [pool.submit(run, call) for call in calls]]


class Counting(LogitsProcessor):
    """A processor with state, which looks at everything that it is shown."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.num_calls += 1
        scores = scores.clone()
        scores[:, (input_ids.sum().item() + self.num_calls) % scores.shape[1]] -= 20
        return scores


class Collecting(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


# For each kind: a function that makes a call's options anew, and the tier that the call takes.
KINDS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "greedy": (lambda: {"do_sample": False}, "native"),
    "greedy batch": (lambda: {"do_sample": False, "eos_token_id": [5, 17, 40]}, "native"),
    "sampling": (lambda: {"do_sample": True, "top_k": 1, "temperature": 0.7}, "native"),
    "samples": (lambda: {"do_sample": True, "top_k": 1, "num_return_sequences": 3}, "native"),
    "beams": (lambda: {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}, "native"),
    "penalty": (lambda: {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, "native"),
    "processor": (lambda: {"do_sample": False, "logits_processor": LogitsProcessorList([Counting()])}, "native"),
    "criterion": (lambda: {"do_sample": False, "stopping_criteria": StoppingCriteriaList([_short])}, "native"),
    "streamer": (lambda: {"do_sample": False, "streamer": Collecting()}, "native"),
    "prefix": (
        lambda: {"do_sample": False, "prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) % 90, 5 + row]},
        "native",
    ),
    "lookup": (lambda: {"do_sample": False, "prompt_lookup_num_tokens": 2, "eos_token_id": 95}, "cache"),
    "attentions": (
        lambda: {"do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True},
        "stock",
    ),
}


SINGLE = ("greedy", "streamer", "lookup")


def _short(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    return torch.full((len(input_ids),), bool(input_ids[0, -1] % 7 == 3))


def tokens(result: Any) -> list[list[int]]:
    return (result if isinstance(result, Tensor) else result.sequences).tolist()


def one_of_each(model: Any, number: int) -> tuple[str, Callable[[], tuple[list[list[int]], Any]], list[list[int]]]:
    """Return for call ``number``: its kind, the call itself (returns its tokens and its report), and stock's tokens."""
    kind = list(KINDS)[number % len(KINDS)]
    options, _ = KINDS[kind]
    given = {**prompt(number, rows=1 if kind in SINGLE else 1 + number % 3), "max_new_tokens": 8 + number % 7}
    expected = tokens(model.generate.stock(**given, **options()))

    def call() -> tuple[list[list[int]], Any]:
        result = model.generate(**given, **options())
        return tokens(result), model.generate.last_report()

    return kind, call, expected


def step_when_all_are_there(host: Any, num_calls: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the first step wait for so many calls. Returns how many rows each step samples."""
    step, sampled = host.step, []

    def when_all_are_there() -> bool:
        if not sampled and host.num_open < num_calls:
            time.sleep(0.001)
            return True  # so that the thread looks for more calls
        worked = step()
        sampled.append(host.engine.last_stats.num_sampled)
        return worked

    monkeypatch.setattr(host, "step", when_all_are_there)
    return sampled
