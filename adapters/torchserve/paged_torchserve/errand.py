"""Errand: one request, from its body to the last message of its reply. Belongs to the event loop that the desk
runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from paged_core import InvalidRequestError
from paged_serving import Call, CallError, Exchange, Failure, as_outcome, compile_grammar, json_bytes
from paged_torchserve.forms import JSON, ReplyFormat
from paged_torchserve.lanes import Lane
from paged_torchserve.replies import Reply

_TOO_LONG = "one message of TorchServe's, which is all that gRPC and workflows have; ask for less, or by HTTP"
_ABORTED = "the request was cut off; TorchServe did not ask for its news in time"
_log = logging.getLogger("paged_torchserve")


class Errand:
    """Reads a request, submits its prompts, and puts the results into ``reply``; then calls ``on_news``.

    ``read`` is called in a thread: prompts are tokenised there, and a long list of them holds up no one else.
    ``compilers`` has threads that may be blocked for long. ``form`` is for errors before the request has been read.
    """

    def __init__(
        self,
        read: Callable[[], tuple[Call, ReplyFormat]],
        form: ReplyFormat,
        lane: Lane,
        reply: Reply,
        on_news: Callable[[], None],
        compilers: Executor,
    ) -> None:
        self.reply, self.lane = reply, lane
        self._form, self._on_news = form, on_news
        self._compilers = compilers
        self._exchange: Exchange | None = None  # once it is submitted
        self._streamed = reply.begun  # as far as is known
        self._cancelled = False
        self._not_admitted: set[str] | None = None  # None: not submitted yet
        self._task = asyncio.ensure_future(self._run(read))

    @property
    def settled(self) -> bool:
        """Whether its reply may begin: the engine has accepted it, or it has ended. A refusal before that has its own
        status."""
        return self._not_admitted == set() or self.reply.has_news or self.reply.sent

    def admitted(self, request_id: str) -> None:
        if self._not_admitted:
            self._not_admitted.discard(request_id)

    def cancel(self) -> None:
        """End it soon: the client gets an error, if it is still there. Callable from any thread."""
        self._cancelled = True
        if self._exchange is not None:
            self._exchange.close()

    def fail(self, error: Exception) -> None:
        """End it now, whatever its state in the engine."""
        if not self.reply.ended:
            self._refuse(error)
        self.close()

    def close(self) -> None:
        """The client has left."""
        self.cancel()
        self._task.cancel()

    async def _run(self, read: Callable[[], tuple[Call, ReplyFormat]]) -> None:
        try:
            call, self._form = await asyncio.to_thread(as_outcome, read)
            self._streamed = call.stream
            self.reply.content_type = self._form.stream_type if call.stream else self._form.content_type
            await self._compile(call)
            await self._carry_out(self._submit(call))
        except Exception as error:
            self.cancel()
            if not isinstance(error, CallError | InvalidRequestError):
                _log.error("a request failed", exc_info=error)
            self._refuse(error)
        self._on_news()

    async def _compile(self, call: Call) -> None:
        if call.grammar is not None:
            await asyncio.get_running_loop().run_in_executor(self._compilers, as_outcome, compile_grammar, call)

    def _submit(self, call: Call) -> Exchange:
        self._exchange = Exchange(self.lane.engine, call, aborted=_ABORTED)
        self._not_admitted = self._exchange.request_ids
        if self._cancelled:  # while it was read
            self.cancel()
        return self._exchange

    async def _carry_out(self, exchange: Exchange) -> None:
        if exchange.call.stream:
            await exchange.tell(self)
            self._say(self._form.last_event)
        else:
            self._say(self._form.answer(await exchange.answer()))
        self.reply.end()

    # ---- as its exchange's Listener ----------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return True

    def write(self, chunks: Sequence[Any], large: bool) -> list[bytes]:
        return [self._form.event(chunk) for chunk in chunks]

    def tell(self, told: list[bytes]) -> None:
        for event in told:
            self._say(event)
        self._on_news()

    async def wait_and_tell(self, told: list[bytes]) -> None:
        self.tell(told)

    def _say(self, told: bytes) -> None:
        self.reply.say(told)
        if self.reply.is_too_long:
            raise CallError(Failure.TOO_LARGE, f"the answer is longer than {_TOO_LONG}")

    def _refuse(self, error: Exception) -> None:
        """Send ``error`` to the client: with its status, or, if the reply has begun, as its last part."""
        try:
            status, body = self._form.error(error)
            told = json_bytes(body)
        except Exception as failure:  # any error, because a reply that never ends would be worse
            _log.error("an error could not be told", exc_info=failure)
            status, told = 500, b'{"error": "the server failed; its log says more"}'
        if not self.reply.started:
            self.reply.refuse(status, told, JSON)
            return
        if self._streamed:
            self.reply.say(self._form.late_error(told) + self._form.last_event)
        else:
            self.reply.say(told)
        self.reply.end()
