"""What a server's log tells whoever waits for it: that kernels are being compiled, and why a model has not loaded."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numba

from paged_torchserve import worker_log
from paged_torchserve.worker_log import BEGINS, ENDS, Patience, announce_compiling, last_words

FAILED = """\
nvidia-smi not available or failed: Cannot run program "nvidia-smi": error=2, No such file or directory
2026-11-29T20:59:05 [INFO ] W-9000-m-stdout MODEL_LOG - Traceback (most recent call last):
2026-11-29T20:59:05 [INFO ] W-9000-m-stdout MODEL_LOG -   File "handler.py", line 7, in initialize
2026-11-29T20:59:05 [INFO ] W-9000-m-stdout MODEL_LOG -     raise ValueError("not this line")
2026-11-29T20:59:05 [INFO ] W-9000-m-stdout MODEL_LOG - paged_core.errors.ConfigError: there is no model: look again
2026-11-29T20:59:06 [ERROR] W-9000-m org.pytorch.serve.wlm.WorkerThread - Backend worker error
2026-11-29T20:59:06 [WARN ] W-9000-m org.pytorch.serve.wlm.BatchAggregator - Load model failed: m, error: Worker died.
"""


def test_a_failure_is_told_by_what_the_worker_raised():
    assert last_words(FAILED) == ["paged_core.errors.ConfigError: there is no model: look again"]


def test_without_a_worker_a_failure_is_told_by_what_torchserve_calls_an_error():
    log = "\n".join(line for line in FAILED.splitlines() if "MODEL_LOG" not in line)
    told = last_words(log)
    assert len(told) == 2 and "Backend worker error" in told[0]
    assert last_words("nvidia-smi not available or failed\nthe address is in use") == ["the address is in use"]


def test_a_worker_tells_when_it_begins_and_ends_to_compile():
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    log = logging.getLogger("test-compiling")
    log.setLevel(logging.INFO)
    log.addHandler(Handler())
    announce_compiling(log)

    @numba.njit
    def inner(number):
        return number + 1

    @numba.njit
    def outer(number):
        return inner(number) * 2

    assert outer(3) == 8
    assert told == [BEGINS, ENDS]
    assert outer(4) == 10
    assert len(told) == 2, "what is compiled is not compiled again"


def test_time_in_which_a_worker_compiles_is_not_counted_against_a_start(monkeypatch):
    now = 100.0
    monkeypatch.setattr(worker_log, "time", SimpleNamespace(monotonic=lambda: now))
    patience = Patience(10)
    log = ""
    for seconds, then in [(6, BEGINS), (1000, ENDS), (3, f"{BEGINS} {BEGINS} {ENDS}"), (1000, ENDS)]:
        now += seconds
        assert not patience.is_at_its_end(log)
        log += f"\n{then}"
    now += 0.5
    assert not patience.is_at_its_end(log)
    now += 0.6
    assert patience.is_at_its_end(log)
