"""Checks many model types, each in a process of its own: one that crashes or hangs ends only itself.

The processes are forked from a server that has imported everything heavy, so that each costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from paged_coverage.check import BUILDING, NOT_BUILT, STOCKS, WRONG, Row, said
from paged_coverage.tiny import class_name

Check = Callable[[str, Callable[[str], None]], Row]
"""``check(model_type, at)``: says by ``at(step)`` what it is about to do."""

_PRELOAD = ["paged_coverage.preload"]
_START_S = 60.0  # for a process to be forked and to report its first step


def check_all(model_types: Sequence[str], check: Check, jobs: int, timeout_s: float) -> Iterator[Row]:
    """A row for each model type, in order, each as soon as it is known. ``timeout_s``: of each step of a check."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    pool = ThreadPoolExecutor(jobs)
    try:
        for row in [pool.submit(_check_one, context, check, name, timeout_s) for name in model_types]:
            yield row.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, say


def _check_one(context: Any, check: Check, model_type: str, timeout_s: float) -> Row:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, check, model_type), daemon=True)
    process.start()
    theirs.close()
    step, limit_s = "starting", _START_S
    try:
        while ours.poll(limit_s):
            told = ours.recv()
            if isinstance(told, Row):
                return told
            step, limit_s = told, timeout_s
        end = f"{step} took more than {limit_s:g} s"
    except EOFError:
        process.join()
        end = f"the process died ({process.exitcode}) at: {step}"
    finally:
        process.kill()
        process.join()
    return Row(model_type, class_name(model_type), NOT_BUILT if step.startswith((BUILDING, STOCKS)) else WRONG, end)


def _child(connection: Connection, check: Check, model_type: str) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)  # some models print
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    try:
        row = check(model_type, connection.send)
    except BaseException as error:
        row = Row(model_type, class_name(model_type), WRONG, f"the check itself failed: {said(error)}")
    connection.send(row)
