"""Exchange: one request under way in the engine. Belongs to the event loop that the desk runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from paged_core import AsyncEngine, Call, CallError, Failure, GenerationOutput, InvalidRequestError, Stream
from paged_torchserve.bodies import JSON, Form, json_bytes
from paged_torchserve.replies import Reply

_log = logging.getLogger("paged_torchserve")


class Exchange:
    """Submits all prompts of ``call``; what comes of them goes into ``reply``. ``on_news`` is called then.

    Raises:
        EngineDeadError, InvalidRequestError: it can't be submitted.
    """

    def __init__(self, call: Call, form: Form, engine: AsyncEngine, reply: Reply, on_news: Callable[[], None]) -> None:
        self.reply = reply
        self._call, self._form, self._on_news = call, form, on_news
        self._streams: list[Stream] = []
        self._opened = False
        try:
            for prompt in call.prompts:
                self._streams.append(engine.submit(prompt, call.params))
        except BaseException:
            self.cancel()
            raise
        self._not_admitted = {stream.request_id for stream in self._streams}
        self._task = asyncio.ensure_future(self._run())

    @property
    def settled(self) -> bool:
        """Whether the engine has taken it in, or it has ended: a refusal has a status of its own only as long as
        nothing was sent."""
        return not self._not_admitted or self.reply.has_news

    def admitted(self, request_id: str) -> None:
        self._not_admitted.discard(request_id)

    def cancel(self) -> None:
        """End it soon: the client hears an error, if it still listens. Callable from any thread."""
        for stream in self._streams:
            stream.cancel()

    def close(self) -> None:
        """Nobody listens any more."""
        self.cancel()
        self._task.cancel()

    async def _run(self) -> None:
        try:
            if self._call.stream:
                await asyncio.gather(*[self._pump(number, stream) for number, stream in enumerate(self._streams)])
            results = await asyncio.gather(*[stream.aresult() for stream in self._streams])
            self._finish(results)
        except Exception as error:
            self.cancel()
            if not isinstance(error, CallError | InvalidRequestError):
                _log.error("a request failed", exc_info=error)
            refuse(self.reply, self._form, error, as_event=self._call.stream)
        self._on_news()

    async def _pump(self, number: int, stream: Stream) -> None:
        async for delta in stream:
            _check(delta.finish_reason, delta.error)
            chunks = self._call.chunks(number, delta)
            if not self._opened:
                chunks = self._call.first_chunks() + chunks
                self._opened = True
            for chunk in chunks:
                self.reply.say(self._form.event(chunk))
            self._on_news()

    def _finish(self, results: list[GenerationOutput]) -> None:
        for result in results:
            for output in result.outputs:
                _check(output.finish_reason, result.error)
        if self._call.stream:
            for chunk in self._call.last_chunks(results):
                self.reply.say(self._form.event(chunk))
            self.reply.say(self._form.last_event)
        else:
            self.reply.say(self._form.answer(self._call.answer(results)))
        self.reply.end()


def refuse(reply: Reply, form: Form, error: Exception, *, as_event: bool = False) -> None:
    """Tell the client of ``error``: with its status, or, when the reply has begun, as the rest of it."""
    status, body = form.error(error)
    if not reply.started:
        reply.refuse(status, json_bytes(body), JSON)
        return
    reply.say(b"data: " + json_bytes(body) + b"\n\n" if as_event else json_bytes(body))
    if as_event:
        reply.say(form.last_event)
    reply.end()


def _check(finish_reason: str | None, error: str | None) -> None:
    if finish_reason == "abort":
        raise CallError(Failure.CUT, "the request was cut off; TorchServe did not ask for its news in time")
    if finish_reason == "error":
        raise CallError(Failure.GENERATION, error or "the generation failed")
