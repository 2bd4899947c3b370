"""Events as content blocks, for protocols whose answers are lists of items. Knows no protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from paged_serving.conversation.events import (
    ArgumentsDelta,
    Event,
    Finish,
    ReasoningDelta,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
)


@dataclass
class ContentBlock:
    """A part of an answer. It grows until it is closed."""

    kind: Literal["text", "reasoning", "call"]
    index: int  # among the blocks of the answer
    call_id: str = ""
    name: str = ""  # of the tool that is called
    cut: bool = False  # it was cut; never a call, which is sent when it is complete
    _pieces: list[str] = field(default_factory=list, init=False)  # joined when asked for

    def add(self, text: str) -> None:
        self._pieces.append(text)

    @property
    def text(self) -> str:
        """Of a call: the JSON text of its arguments."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return "".join(self._pieces)


@dataclass(frozen=True)
class ContentNews:
    """``block`` was opened, has grown by ``text``, or is complete."""

    what: Literal["opened", "grown", "closed"]
    block: ContentBlock
    text: str = ""


class ContentBlocks:
    """The blocks of one answer, made from its events."""

    def __init__(self) -> None:
        self.all: list[ContentBlock] = []
        self.finish: Finish | None = None  # None: it goes on
        self._open: ContentBlock | None = None

    def feed(self, events: Iterable[Event]) -> Iterator[ContentNews]:
        """Take in events. An ended answer has at least one block, which may be an empty text."""
        for event in events:
            match event:
                case TextDelta(text):
                    yield from self._grow("text", text)
                case ReasoningDelta(text):
                    yield from self._grow("reasoning", text)
                case ToolCallStart(_, call_id, name):
                    yield from self._close()
                    yield self._opened(ContentBlock("call", len(self.all), call_id=call_id, name=name))
                case ArgumentsDelta(_, text):
                    yield from self._grow("call", text)
                case ToolCallEnd():
                    yield from self._close()
                case Finish():
                    if not self.all:
                        yield self._opened(ContentBlock("text", 0))
                    if self._open is not None:
                        self._open.cut = event.reason == "length"
                    yield from self._close()
                    self.finish = event

    def _grow(self, kind: Literal["text", "reasoning", "call"], text: str) -> Iterator[ContentNews]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            yield self._opened(ContentBlock(kind, len(self.all)))
        assert self._open is not None, "it was opened"
        self._open.add(text)
        yield ContentNews("grown", self._open, text)

    def _opened(self, block: ContentBlock) -> ContentNews:
        self.all.append(block)
        self._open = block
        return ContentNews("opened", block)

    def _close(self) -> Iterator[ContentNews]:
        if self._open is not None:
            closed, self._open = self._open, None
            yield ContentNews("closed", closed)
