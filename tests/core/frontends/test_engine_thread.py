"""EngineThread by itself: exceptions that strike those who use it, at any point, keep nobody else from going on."""

from __future__ import annotations

import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest

from paged_core import EngineDeadError, EngineThread, ReentryError, ThreadPolicy
from paged_core.frontends.locks import PatientLock
from strikes import LIMIT_S, Struck, strike_until_it_ends, strikes_anywhere

# A strike that hits while the interpreter begins or ends a thread is told, and goes no further.
_STRIKES_OUTSIDE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Idle(ThreadPolicy):
    """Nothing to compute; what fails is kept."""

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self.thread = EngineThread("idle", self)

    def step(self) -> bool:
        return False

    def failed(self, error: BaseException) -> None:
        self.failures.append(error)

    def shut_down(self) -> None:
        assert not self.thread.running

    def hold(self, holder: object) -> None:
        with self.thread.lock():
            self.thread.hold(holder)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        with self.thread.lock():
            return self.thread.call(function)


@pytest.fixture
def policy() -> Iterator[Idle]:
    policy = Idle()
    yield policy
    for holder in list(policy.thread.holders):
        policy.thread.leave(holder, int)
    assert policy.thread.wait_until_free(LIMIT_S)
    assert not policy.thread.running


@pytest.fixture
def thread(policy: Idle) -> EngineThread:
    return policy.thread


@_STRIKES_OUTSIDE
def test_no_exception_leaves_the_lock_locked() -> None:
    lock, rnd = PatientLock(), random.Random(0)

    def enters_and_leaves() -> None:
        while True:
            with lock.bare():
                pass

    with strikes_anywhere():
        for _ in range(250):
            strike_until_it_ends(enters_and_leaves, rnd.random() * 0.003)
            assert not lock._lock.locked()


def test_a_lock_that_nobody_gives_back_is_noticed() -> None:
    lock = PatientLock(patience_s=0.05)
    with lock.bare():
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="has held the lock of the engine's thread for"):
                lock.bare()
    with lock.bare():
        pass


@_STRIKES_OUTSIDE
def test_holders_that_are_struck_neither_hang_nor_keep_the_thread(policy: Idle, thread: EngineThread) -> None:
    rnd = random.Random(1)

    def comes_and_goes() -> None:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            holder = object()
            try:
                policy.hold(holder)
            finally:
                thread.leave(holder, int)
            thread.wait_until_free()

    others = threading.Event()

    def other() -> None:
        while not others.is_set():
            holder, told = object(), threading.Event()
            policy.hold(holder)
            thread.post(told.set)
            assert told.wait(LIMIT_S)
            thread.leave(holder, int)
            assert thread.wait_until_free(LIMIT_S)

    with strikes_anywhere():
        bystander = threading.Thread(target=other, daemon=True)
        bystander.start()
        for _ in range(60):
            strike_until_it_ends(comes_and_goes, rnd.random() * 0.005)
        others.set()
        bystander.join(LIMIT_S)
        assert not bystander.is_alive()
    assert not policy.failures


def test_a_reader_struck_as_it_begins_to_wait_does_not_keep_the_thread_from_answering(
    policy: Idle, thread: EngineThread
) -> None:
    policy.hold(policy)
    go_on = threading.Event()
    thread.post(go_on.wait)
    answer = policy.call(lambda: 7)

    def strike(frame: FrameType, event: str, arg: object) -> Any:
        if event == "return" and (frame.f_code.co_filename, frame.f_code.co_name) == (threading.__file__, "__enter__"):
            raise Struck  # in the moment between a lock that was taken and the block that gives it back
        return strike

    def reads() -> None:
        sys.settrace(strike)
        with suppress(Struck, TimeoutError):
            answer.result(0.05)

    reader = threading.Thread(target=reads, daemon=True)
    reader.start()
    reader.join(LIMIT_S)
    go_on.set()
    assert answer.result(LIMIT_S) == 7
    assert policy.call(lambda: 8).result(LIMIT_S) == 8


def test_it_lives_while_it_is_held_and_begins_again(policy: Idle, thread: EngineThread) -> None:
    for _ in range(2):
        policy.hold("a")
        policy.hold("b")
        assert policy.call(threading.current_thread).result(LIMIT_S).name == "idle"
        thread.leave("a", int)
        assert thread.wait_until_free(LIMIT_S), "b holds it"
        assert thread.running
        said: list[str] = []
        thread.leave("b", lambda said=said: said.append("last"))
        assert thread.wait_until_free(LIMIT_S)
        assert not thread.running and said == ["last"]


def test_waiting_for_its_end_has_a_limit_and_ends_when_it_is_held_again(policy: Idle, thread: EngineThread) -> None:
    policy.hold("a")
    go_on = threading.Event()
    thread.post(go_on.wait)
    thread.leave("a", int)
    assert not thread.wait_until_free(0.01)
    policy.hold("b")
    assert thread.wait_until_free(LIMIT_S)
    go_on.set()


def test_what_a_command_raises_is_the_policys_and_the_next_one_runs(policy: Idle, thread: EngineThread) -> None:
    policy.hold(policy)
    thread.post(lambda: sys.exit("mine"))
    assert policy.call(lambda: 7).result(LIMIT_S) == 7
    assert [str(error) for error in policy.failures] == ["mine"]


def test_the_thread_itself_waits_for_nothing_that_only_it_can_bring_about(policy: Idle, thread: EngineThread) -> None:
    policy.hold(policy)
    inner = policy.call(lambda: policy.call(lambda: 7).result())
    with pytest.raises(ReentryError, match="wait in another thread"):
        inner.result(LIMIT_S)

    def leaves() -> bool:
        thread.leave(policy, int)
        return thread.wait_until_free()

    assert policy.call(leaves).result(LIMIT_S)


def test_it_is_busy_only_while_it_is_at_something(policy: Idle, thread: EngineThread) -> None:
    assert thread.busy_s == 0
    policy.hold(policy)
    at_it, go_on = threading.Event(), threading.Event()
    thread.post(lambda: (at_it.set(), go_on.wait()))
    assert at_it.wait(LIMIT_S)
    assert thread.busy_s > 0
    go_on.set()
    deadline = time.monotonic() + LIMIT_S
    while thread.busy_s > 0:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_owner_that_never_started_it_is_freed_at_once() -> None:
    policy = Idle()
    policy.hold(policy)
    policy.thread.leave(policy, int)
    assert policy.thread.wait_until_free(LIMIT_S)
    gone = weakref.ref(policy)
    del policy
    assert gone() is None
