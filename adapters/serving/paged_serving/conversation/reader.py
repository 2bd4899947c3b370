"""From generated text to events, with one reader per choice. Knows no protocol."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from paged_core import CompletionOutput, StreamDelta
from paged_serving.conversation.events import Event, Finish, FinishReason, TextDelta, ToolCallStart


class Parser(Protocol):
    """Separates text, reasoning and calls. It takes the model's text in any pieces; the joined events are the same."""

    def feed(self, text: str) -> Iterable[Event]: ...

    def finish(self, *, cut: bool) -> Iterable[Event]:
        """The events that were held back, since no more text will come. ``cut``: the answer was cut."""
        ...


class PlainText:
    """The parser of answers that are only text."""

    def feed(self, text: str) -> Iterable[Event]:
        return (TextDelta(text),) if text else ()

    def finish(self, *, cut: bool) -> Iterable[Event]:
        return ()


class ChoiceReader:
    """Turns the deltas of one choice into events."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._num_tokens = 0
        self._has_called = False

    def feed(self, news: StreamDelta | CompletionOutput) -> list[Event]:
        """The events of ``news``; a Finish is the last one, where it ends.

        ``news`` that ended in an error or an abort is not for readers.
        """
        self._num_tokens += len(news.token_ids)
        events = list(self._parser.feed(news.text))
        if news.finish_reason is not None:
            cut = news.finish_reason == "length"
            events += self._parser.finish(cut=cut or isinstance(news.stop_reason, str))
        self._has_called = self._has_called or any(isinstance(event, ToolCallStart) for event in events)
        if news.finish_reason is not None:
            events.append(Finish(self._reason(news.finish_reason), news.stop_reason, self._num_tokens))
        return events

    def _reason(self, ended: str) -> FinishReason:
        if ended == "length":
            return "length"
        return "tool_calls" if self._has_called else "stop"
