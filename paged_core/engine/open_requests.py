"""OpenRequests: the requests of an engine that have not ended, and outputs that their callers have not got yet.

This file knows ids, rows and outputs. Only the Scheduler knows how far each row has come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from paged_core.engine.observers import Observers
from paged_core.engine.selection import PromptLogprobs
from paged_core.scheduling.request import Request, RequestOutput


class OpenRequests:
    """Rows by the id of their request, from when they are queued until they end."""

    def __init__(self, observers: Observers) -> None:
        self._observers = observers
        self._rows: dict[str, list[Request]] = {}
        self._prompt_logprobs: dict[str, list[Any]] = {}  # by request id; returned with its first token
        self._untold: list[RequestOutput] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_untold(self) -> bool:
        return bool(self._untold)

    def rows(self, request_id: str) -> list[Request]:
        return list(self._rows.get(request_id, ()))

    def add(self, rows: Sequence[Request]) -> None:
        self._rows[rows[0].id] = list(rows)
        if rows[0].params.prompt_logprobs is not None:
            self._prompt_logprobs[rows[0].id] = [None]  # the first token of a prompt has none
        for request in rows:
            self._observers.tell("on_request_added", request=request)

    def keep(self, prompt_logprobs: Iterable[PromptLogprobs]) -> None:
        """Keep logprobs of prompts, which are returned once, with the first token of any row. A preempted row may
        compute them again."""
        for request, start, found in prompt_logprobs:
            if request.id in self._prompt_logprobs:
                self._prompt_logprobs[request.id][start:] = found

    def end(self, final: Iterable[RequestOutput]) -> None:
        """Forget rows that have ended."""
        for output in final:
            request = output.request
            rows = self._rows[request.id]
            rows.remove(request)
            if not rows:
                del self._rows[request.id]
                self._prompt_logprobs.pop(request.id, None)
            self._observers.tell("on_request_finished", output=output)

    def tell_later(self, final: Iterable[RequestOutput]) -> None:
        """Keep the outputs of rows that ended between two steps; the next step returns them."""
        self._untold += final

    def tell(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Return kept outputs, then ``outputs``, and forget the rows that have ended."""
        if self._prompt_logprobs:
            outputs = [
                output._replace(prompt_logprobs=self._prompt_logprobs.pop(output.request.id))
                if output.request.id in self._prompt_logprobs
                else output
                for output in outputs
            ]
        self.end(output for output in outputs if output.finish_reason is not None)
        outputs, self._untold = self._untold + outputs, []
        return outputs
