"""What a request's code raises is the request's; what a signal raises is the process's."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bad_request import MyOwn
from paged_core.interrupts import interrupts_the_process


@pytest.fixture(autouse=True)
def as_a_shell_has_them() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def answer_for(work: Callable[[], object]) -> bool:
    try:
        work()
    except BaseException as error:
        return interrupts_the_process(error)
    raise AssertionError("nothing was raised")


def exits(number: int, frame: Any) -> None:
    raise SystemExit(0)


class Handler:
    def __call__(self, number: int, frame: Any) -> None:
        self.on_signal(number, frame)

    def on_signal(self, number: int, frame: Any) -> None:
        raise TimeoutError("took too long")


def wait_for_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while True:
        time.sleep(0.001)


def spin_until_interrupted() -> None:
    threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
    while True:
        pass


@pytest.mark.parametrize("way", [signal.raise_signal, functools.partial(time.sleep, 30)], ids=["at once", "asleep"])
def test_ctrl_c_interrupts_the_process(way: Callable[..., object]) -> None:
    if way is not signal.raise_signal:
        threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        assert answer_for(way)
    else:
        assert answer_for(lambda: way(signal.SIGINT))
    assert answer_for(spin_until_interrupted)


@pytest.mark.parametrize(
    "handler", [exits, functools.partial(exits), Handler(), Handler().on_signal], ids=lambda h: type(h).__name__
)
def test_so_does_what_a_handler_raises_whatever_its_class(handler: Any) -> None:
    signal.signal(signal.SIGALRM, handler)
    assert answer_for(wait_for_alarm)


def raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit(), MyOwn(), ValueError()], ids=repr
)
def test_what_code_raises_by_itself_does_not(error: BaseException) -> None:
    assert not answer_for(lambda: raises(error))


def test_no_signal_strikes_another_thread() -> None:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(answer_for(lambda: raises(KeyboardInterrupt()))))
    thread.start()
    thread.join()
    assert answers == [False]
