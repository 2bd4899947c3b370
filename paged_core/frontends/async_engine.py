"""AsyncEngine: one thread steps the engine; any thread and any event loop submits, listens and cancels.

Who owns what: the engine and the table of running requests belong to the stepping thread alone. Others reach it
through one queue of commands, and hear from it through Streams, which are behind their own locks. A Stream never
makes the stepping thread wait: what its reader hasn't fetched yet is joined into one delta.

A forked child has a copy of the engine and not its thread. There the streams of the parent's requests have failed, and
so has the engine, unless its thread never ran: then the child's own starts with its first request.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from paged_core.config import EngineConfig
from paged_core.engine.engine import Engine
from paged_core.engine.openmp import release_helper_threads
from paged_core.errors import EngineBusyError, EngineDeadError, InvalidRequestError, ReentryError, RequestError
from paged_core.frontends.frontend import Frontend
from paged_core.frontends.stream import Channel, Stream, Wakeups
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import RequestOutput
from paged_core.text.codec import prepare_params
from paged_core.text.generation import Generation, deliver
from paged_core.text.outputs import StreamDelta
from paged_core.text.prompts import encode_prompt

__all__ = ["AsyncEngine", "Stream"]

_T = TypeVar("_T")
_COMMANDS_S = 0.01  # for commands between two steps; what has begun is finished
_MAX_LOOKS = 1024  # that wait


class _Answer(Future[_T]):
    """A Future that the thread which is to fulfil it can't wait for."""

    def __init__(self, check_may_wait: Callable[[], None]) -> None:
        super().__init__()
        self._check_may_wait = check_may_wait

    def result(self, timeout: float | None = None) -> _T:
        self._check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check()
        return super().exception(timeout)

    def _check(self) -> None:
        if not self.done():
            self._check_may_wait()


class _Submit(NamedTuple):
    generation: Generation
    channel: Channel


class _Cancel(NamedTuple):
    channel: Channel


class _Look(NamedTuple):
    function: Callable[[Engine], Any]
    answer: Future[Any]


class _Close(NamedTuple):
    pass


class AsyncEngine(Frontend):
    """An Engine for servers. Its thread starts with the first request, sleeps when there is nothing to do, and ends
    with ``close()`` (or the ``with`` block).

    Args:
        model: an Engine (taken over: use it no more yourself), or whatever an Engine takes.
        tokenizer: taken from the model (by the ``load_tokenizer`` hook) when None.
        config: an EngineConfig; or give its fields as keyword arguments.
        max_requests: how many may be under way at once, waiting ones and those being cancelled included.
        options: those fields; and ``device``, ``dtype``, ``plugins`` and ``progress``, as Engine takes them.

    Raises:
        TypeError: an option is unknown, or ``model`` is an Engine, which has its options already.
        Else what Engine raises.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        config: EngineConfig | None = None,
        max_requests: int = 16_384,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, config, options)
        release_helper_threads()  # loading has taken some; from now on only the stepping thread computes
        self._max_requests = max_requests
        self._closed = False
        self._dead: BaseException | None = None
        self._numbers = itertools.count()
        self._channels: weakref.WeakSet[Channel] = weakref.WeakSet()  # those somebody may still read
        self._answers: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
        self._start_afresh()
        _OPEN.add(self)

    def _start_afresh(self) -> None:
        self._commands: SimpleQueue[_Submit | _Cancel | _Look | _Close] = SimpleQueue()  # put() is safe even in __del__
        self._lock = threading.Lock()  # guards the three below, _closed and _dead
        self._thread: threading.Thread | None = None
        self._ids: set[str] = set()  # of requests that have not ended
        self._num_looks = 0  # that have not been answered
        self._running: dict[str, _Submit] = {}  # the stepping thread's own
        self._began: float | None = None  # when it took up what it is at; None: it waits for something to do

    @property
    def alive(self) -> bool:
        """Whether it takes requests: it has not failed and isn't closed."""
        return self._dead is None and not self._closed

    @property
    def busy_s(self) -> float:
        """How long the stepping thread has been at its present step or command; 0 while it has nothing to do. A step
        that never ends shows here."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def submit(self, prompt: Any, params: SamplingParams | None = None, request_id: str | None = None) -> Stream:
        """Queue a prompt in any form that ``encode_prompt`` takes: a string, token ids, messages. Callable from any
        thread and inside event loops; the prompt is tokenised here, in the caller's thread.

        Raises:
            InvalidRequestError: the prompt is no prompt, params are no SamplingParams, or the id is in use. What only
                the engine can tell (the prompt is too long, say) is raised by the Stream.
            EngineBusyError: ``max_requests`` have not ended yet.
            EngineDeadError: the engine was closed or has failed, or stayed in the parent of this process.
            RuntimeError: its thread can't be started (too many threads); a later request may find it can.
        """
        self._check_open()
        arrival = time.perf_counter()
        params = prepare_params(self.codec, params or SamplingParams())
        encoded = encode_prompt(self.codec, prompt)
        if request_id is None:
            request_id = f"request-{next(self._numbers)}"
        channel = Channel(request_id, self._cancel_soon, self._check_may_wait)
        generation = Generation(request_id, encoded, params, self.codec, arrival)
        with self._lock:
            self._check_open()
            if request_id in self._ids:
                raise InvalidRequestError(f"request id {request_id!r} is in use; choose another")
            if len(self._ids) >= self._max_requests:
                raise EngineBusyError(f"{self._max_requests} requests are under way, the limit; try again soon")
            self._start()
            self._ids.add(request_id)
            self._channels.add(channel)
            self._commands.put(_Submit(generation, channel))
        return Stream(channel)

    def look(self, function: Callable[[Engine], _T]) -> Future[_T]:
        """``function(engine)``, called by the stepping thread between two steps: all requests wait for it meanwhile.

        Raises:
            EngineBusyError: very many looks wait already.
            EngineDeadError: the engine was closed or has failed; the Future raises it if that happens later.
            ReentryError: raised by the Future, where the stepping thread itself would wait for it.
        """
        answer: _Answer[_T] = _Answer(self._check_may_wait)
        with self._lock:
            self._check_open()
            if self._num_looks >= _MAX_LOOKS:
                raise EngineBusyError(f"{_MAX_LOOKS} looks at the engine wait, the limit; try again soon")
            self._start()
            self._num_looks += 1
            self._answers.add(answer)
            self._commands.put(_Look(function, answer))
        return answer

    def close(self, timeout: float | None = None) -> None:
        """Abort what runs (every stream gets its final delta), end the thread, close the engine. May be repeated.

        Raises:
            TimeoutError: the step under way did not end in ``timeout`` seconds; the rest follows when it does.
        """
        with self._lock:
            first, self._closed = not self._closed, True
            thread = self._thread
            if first:
                self._commands.put(_Close())
        if thread is None:
            if first and self._dead is None:
                self.engine.close()
        elif thread is not threading.current_thread():
            thread.join(timeout)
            if thread.is_alive():
                raise TimeoutError(f"the engine's step has not ended in {timeout:g} s")

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def _cancel_soon(self, channel: Channel) -> None:
        self._commands.put(_Cancel(channel))

    def _check_may_wait(self) -> None:
        if self._thread is threading.current_thread():
            raise ReentryError(
                "the engine's own thread (in a logits processor or an observer, say) can't wait for what only it can "
                "bring about; wait in another thread"
            )

    def _check_open(self) -> None:
        if self._dead is not None:
            raise _told(self._dead)
        if self._closed:
            raise EngineDeadError("the engine is closed")

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="paged-engine", daemon=True)
            thread.start()  # it waits for our lock, and ends if an interrupt keeps us from the next line
            self._thread = thread

    def _forked(self) -> None:
        """In the child, right after the fork. Whatever other threads held or had half done is made anew."""
        forked = EngineDeadError("the process was forked; build an engine in the child")
        if self._thread is not None:
            self._dead = self._dead or forked
        self.codec.renew_locks()
        self._start_afresh()
        for channel in list(self._channels):
            channel.forked(_told(forked))
        for answer in list(self._answers):
            answer._condition = threading.Condition()
            with suppress(InvalidStateError):  # it has its answer
                answer.set_exception(_told(forked))

    # ---- the stepping thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._lock:
            if self._thread is not threading.current_thread():
                return
        try:
            while self._obey():
                if self.engine.has_work:
                    self._began = time.monotonic()
                    self._deliver(self.engine.step())
            self._abort(list(self._running.values()))
            self.engine.close()
        except BaseException as error:
            self._die(error)

    def _obey(self) -> bool:
        """Carry out the commands that have come, as far as there is time; when there is nothing else to do, wait for
        one. False: close."""
        until = time.monotonic() + _COMMANDS_S
        while not self.engine.has_work or ((self._closed or time.monotonic() < until) and not self._commands.empty()):
            self._began = None
            command = self._commands.get()
            self._began = time.monotonic()
            if isinstance(command, _Close):
                return False
            self._carry_out(command)
        return True

    def _carry_out(self, command: _Submit | _Cancel | _Look) -> None:
        if isinstance(command, _Cancel):
            self._cancel(command.channel)
        elif isinstance(command, _Look):
            with self._lock:
                self._num_looks -= 1
            _answer(command, self.engine)
        else:
            self._admit(command)

    def _admit(self, submit: _Submit) -> None:
        generation = submit.generation
        self._running[generation.request_id] = submit
        if submit.channel.cancelled:
            return self._abort([submit])  # it costs no step
        try:
            self.engine.add_request(
                generation.request_id,
                generation.prompt.token_ids,
                generation.params,
                eos_token_ids=self.codec.eos_token_ids,
            )
        except EngineDeadError:
            raise
        except InvalidRequestError as error:
            self._end(submit, error)
        except BaseException as error:
            self.engine.abort(generation.request_id)
            self._end(submit, RequestError(generation.request_id, f"it could not be taken in: {error!r}"))

    def _cancel(self, channel: Channel) -> None:
        submit = self._running.get(channel.request_id)
        if submit is not None and submit.channel is channel:  # not a later one of the same id
            self.engine.abort(channel.request_id)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        wakeups = Wakeups()
        for output in outputs:
            submit = self._running.get(output.request.id)
            if submit is not None:
                self._push(submit, deliver(self.engine, submit.generation, output), wakeups)
        wakeups.send()

    def _push(self, submit: _Submit, deltas: Sequence[StreamDelta], wakeups: Wakeups) -> None:
        generation = submit.generation
        result = None
        if generation.finished:
            self._forget(generation.request_id)
            result = generation.result()
        submit.channel.push(deltas, result, wakeups)

    def _end(self, submit: _Submit, error: Exception) -> None:
        self._forget(submit.generation.request_id)
        wakeups = Wakeups()
        submit.channel.fail(error, wakeups)
        wakeups.send()

    def _forget(self, request_id: str) -> None:
        del self._running[request_id]
        with self._lock:
            self._ids.discard(request_id)

    def _abort(self, submits: Sequence[_Submit]) -> None:
        wakeups = Wakeups()
        for submit in submits:
            self.engine.abort(submit.generation.request_id)
            self._push(submit, submit.generation.abort(), wakeups)
        wakeups.send()

    def _die(self, error: BaseException) -> None:
        with self._lock:
            self._dead = error
            commands = []
            while not self._commands.empty():
                commands.append(self._commands.get())
        late = [command for command in commands if isinstance(command, _Submit)]
        wakeups = Wakeups()
        for submit in [*self._running.values(), *late]:
            submit.channel.fail(_told(error), wakeups)
        for command in commands:
            if isinstance(command, _Look) and command.answer.set_running_or_notify_cancel():
                command.answer.set_exception(_told(error))
        self._running.clear()
        wakeups.send()
        with suppress(Exception):
            self.engine.close()


def _told(error: BaseException) -> EngineDeadError:
    """What callers hear of the engine's end: each an error of its own."""
    told = EngineDeadError(f"the engine has failed: {error if isinstance(error, EngineDeadError) else repr(error)}")
    told.__cause__ = error
    return told


def _answer(look: _Look, engine: Engine) -> None:
    if not look.answer.set_running_or_notify_cancel():
        return
    try:
        found = look.function(engine)
    except BaseException as error:  # whatever it is, it is for who asked
        look.answer.set_exception(error)
    else:
        look.answer.set_result(found)


_OPEN: weakref.WeakSet[AsyncEngine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Python must not end under a thread that is inside torch."""
    for engine in list(_OPEN):
        engine.close()


def _after_fork() -> None:
    for engine in list(_OPEN):
        engine._forked()


os.register_at_fork(after_in_child=_after_fork)
