"""The patched ``model.generate``, called by as many threads as there are requests. Knows nothing of engines.

Stock behind a lock is its baseline: ``hf-sequential`` does the same calls one after another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from paged_bench.results import Run, Sample
from paged_bench.stock import Clock, Told, without_eos
from paged_bench.workloads import BenchRequest
from paged_hf.generate.patched import paged_generate


class PagedCallers:
    """Every request is a thread that calls ``generate`` at its arrival, as in a program with many users."""

    def __init__(self, model: Any, kv_cache_memory: int | None) -> None:
        self.model = model
        without_eos(model)
        model.generate = paged_generate(model, kv_cache_memory=kv_cache_memory)

    def run(self, requests: Sequence[BenchRequest], told: Told) -> Run:
        self.model.generate.release()  # no run uses prefixes cached by another
        self._call(requests[0], 4, lambda num: None)  # builds the engine
        samples: dict[int, tuple[Sample, ...]] = {}
        failures: list[Exception] = []
        began = time.perf_counter()

        def call(request: BenchRequest) -> None:
            time.sleep(max(0.0, began + request.arrival_s - time.perf_counter()))
            try:
                rows, times = self._call(request, request.num_output, told)
            except Exception as error:
                failures.append(error)
                return
            stamps = tuple(at - began for at in times)
            samples[request.index] = tuple(Sample(tuple(row), stamps) for row in rows)

        threads = [threading.Thread(target=call, args=(request,), daemon=True) for request in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise RuntimeError(f"{len(failures)} of {len(requests)} calls failed, the first with {failures[0]!r}")
        return Run(samples, time.perf_counter() - began)

    def _call(self, request: BenchRequest, num_output: int, told: Told) -> tuple[list[list[int]], list[float]]:
        """Tokens of each sample, and the times of their steps."""
        prompt = torch.tensor([request.prompt])  # i64 [1,L]
        clock = Clock([num_output], request.n, told)
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_output,
            do_sample=request.n > 1,
            num_return_sequences=request.n,
            streamer=clock,
        )  # [n, L + num_output]
        return output[:, prompt.shape[1] :].tolist(), clock.times
