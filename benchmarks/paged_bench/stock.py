"""The baselines: stock Hugging Face, called as its users call it. Knows transformers, not paged memory. Each is one
object with ``run(requests, told) -> Run``. ``told(num)`` is called for generated tokens as they come. ``without_eos``
replaces the model's own generation config: greedy, or plain sampling for more than one sample, and
no end of sequence, so that every system generates exactly the tokens that were asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from paged_bench.results import Run, Sample
from paged_bench.workloads import BenchRequest

Told = Callable[[int], None]

_PAGE = 256  # tokens in a block of transformers' cache, its default


def without_eos(model: Any) -> None:
    """Give this process's copy of the model a generation config that neither stops early nor warps logits."""
    from transformers import GenerationConfig

    # not min_new_tokens, which forbids the end-of-sequence token and so changes greedy's choice
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)


class HFStatic:
    """Left-padded batches in order of arrival; each runs to its longest output. Tokens past a request's own length are
    thrown away, as a user would."""

    def __init__(self, model: Any, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        without_eos(model)

    def run(self, requests: Sequence[BenchRequest], told: Told) -> Run:
        waiting = sorted(requests, key=lambda request: request.arrival_s)
        samples: dict[int, tuple[Sample, ...]] = {}
        reserved = held = 0
        began = time.perf_counter()
        while waiting:
            _wait_until(began + waiting[0].arrival_s)
            now = time.perf_counter() - began
            batch = [request for request in waiting[: self.batch_size] if request.arrival_s <= now]
            waiting = waiting[len(batch) :]
            samples.update(self._generate(batch, began, told))
            slots = _slots(batch)
            reserved, held = reserved + slots[0], held + slots[1]
        return Run(samples, time.perf_counter() - began, kv_waste=1 - held / reserved)

    def _generate(self, batch: Sequence[BenchRequest], began: float, told: Told) -> dict[int, tuple[Sample, ...]]:
        input_ids, mask = _left_padded([request.prompt for request in batch])  # [B, L] each
        n = batch[0].n
        clock = Clock([request.num_output for request in batch], n, told)
        output = self.model.generate(
            input_ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=max(request.num_output for request in batch),
            do_sample=n > 1,
            num_return_sequences=n,
            streamer=clock,
        )  # [B*n, L + longest]
        rows = output[:, input_ids.shape[1] :].tolist()
        times = [at - began for at in clock.times]
        return {
            request.index: tuple(
                Sample(tuple(row[: request.num_output]), tuple(times[: request.num_output]))
                for row in rows[i * n : (i + 1) * n]
            )
            for i, request in enumerate(batch)
        }


class HFSequential:
    """Stock generate, one request at a time. If all would take longer than ``limit_s`` (by the speed of a short trial),
    only every k-th request runs, back to back."""

    def __init__(self, model: Any, limit_s: float) -> None:
        self._one = HFStatic(model, 1)
        self._limit_s = limit_s
        self._stride: int | None = None  # the same for all runs

    def run(self, requests: Sequence[BenchRequest], told: Told) -> Run:
        if len(requests) == 1:  # a warm-up says nothing about all requests
            return self._one.run(requests, told)
        if self._stride is None:
            trial = self._one.run([replace(requests[0], num_output=8, n=1, arrival_s=0.0)], _nobody)
            estimate_s = sum(r.num_output * r.n for r in requests) * trial.duration_s / trial.num_output_tokens
            self._stride = max(1, math.ceil(estimate_s / self._limit_s))
        if self._stride > 1:
            requests = [replace(request, arrival_s=0.0) for request in requests[:: self._stride]]
        return self._one.run(requests, told)


class HFContinuous:
    """transformers' own continuous batching: its manager, which takes a length for each request.

    It gets cache for all requests at once, so that none waits for memory; its own default takes most of the machine's
    memory.

    Raises:
        RuntimeError: it did not answer every request; the message gives details.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        without_eos(model)

    def run(self, requests: Sequence[BenchRequest], told: Told) -> Run:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        if any(request.n > 1 for request in requests):
            raise RuntimeError("hf-continuous takes one sample a request here; leave out --n")
        # -1 is no token, so nothing ends a request before its length
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
        memory = ContinuousBatchingConfig()
        memory.num_blocks = sum(-(-(len(r.prompt) + r.num_output) // _PAGE) + 1 for r in requests)
        with self.model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=memory
        ) as manager:
            began = time.perf_counter()
            done = self._drive(manager, requests, began, told)
            duration_s = time.perf_counter() - began
        return Run({index: (sample,) for index, sample in done.items()}, duration_s)

    def _drive(self, manager: Any, requests: Sequence[BenchRequest], began: float, told: Told) -> dict[int, Sample]:
        waiting = sorted(requests, key=lambda request: request.arrival_s)
        wanted = {str(request.index): request for request in requests}
        done: dict[int, Sample] = {}
        while len(done) < len(requests):
            while waiting and began + waiting[0].arrival_s <= time.perf_counter():
                request = waiting.pop(0)
                manager.add_request(
                    list(request.prompt),
                    request_id=str(request.index),
                    max_new_tokens=request.num_output,
                    record_timestamps=True,
                )
            answer = manager.get_result(timeout=0.01 if waiting else 1)
            if answer is None and not manager.is_running():
                raise RuntimeError(f"its manager died after {len(done)} of {len(requests)} requests")
            if answer is None or not answer.is_finished():
                continue
            request = wanted[answer.request_id]
            if answer.error is not None or len(answer.generated_tokens) < request.num_output:
                got = f"{len(answer.generated_tokens)} of {request.num_output} tokens"
                raise RuntimeError(f"request {request.index} ended with {got}: {answer.error or 'no error given'}")
            times = tuple(at - began for at in answer.timestamps or ())
            done[request.index] = Sample(tuple(answer.generated_tokens[: request.num_output]), times)
            told(request.num_output)
        return done


class Clock:
    """A streamer that records the time of each step's tokens; ``generate`` first puts the prompt."""

    def __init__(self, lengths: Sequence[int], n: int, told: Told) -> None:
        self.times: list[float] = []
        self._lengths, self._n, self._told = lengths, n, told
        self._seen_prompt = False

    def put(self, value: Any) -> None:
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self.times.append(time.perf_counter())
        self._told(self._n * sum(length >= len(self.times) for length in self._lengths))

    def end(self) -> None:
        pass


def _nobody(num: int) -> None:
    """Ignores progress."""


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids, attention_mask``: int64 [B, longest] each."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(mask)


def _slots(batch: Sequence[BenchRequest]) -> tuple[int, int]:
    """K/V slots of a static batch summed over its steps: reserved, and holding a token of a request still under way.

    The cache grows by one slot per row and step, so nothing is reserved ahead; padding and finished rows are the waste.
    """
    longest = max(len(request.prompt) for request in batch)
    steps = max(request.num_output for request in batch)
    reserved = sum((longest + step) * len(batch) for step in range(steps))
    held = sum(sum(len(request.prompt) + step for step in range(request.num_output)) for request in batch)
    return reserved, held


def _wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))
