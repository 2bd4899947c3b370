"""Reply: what is to be sent to one client, piece by piece, as TorchServe's frontend takes it.

The frontend sends status and content type with a reply's first message. A message longer than its limit would kill
the worker: long replies are sent in pieces.
"""

from __future__ import annotations

from typing import NamedTuple

MESSAGE_BYTES = 1 << 20


class Message(NamedTuple):
    """One step's news for one client."""

    body: bytes
    end: bool | None  # None: this is the whole reply; True: its last message; False: more will follow
    status: int
    content_type: str


class Reply:
    """Filled by ``say`` and ``end``; ``take`` is called once a step.

    ``begun``: the frontend has sent a beginning that came from another worker. A message that said "this is the whole"
    would never end that answer.
    """

    def __init__(self, content_type: str, max_bytes: int = MESSAGE_BYTES, *, begun: bool = False) -> None:
        self.begun = begun
        self.content_type = content_type  # may be changed until it has started
        self.status = 200  # goes out with the first message
        self._max_bytes = max_bytes
        self._unsent = bytearray()
        self.sent = False  # whether there has been a message
        self.ended = False

    @property
    def started(self) -> bool:
        """Whether status and content type have gone out, or text that needs them."""
        return self.begun or self.sent or bool(self._unsent)

    @property
    def has_news(self) -> bool:
        return self.ended or bool(self._unsent)

    def say(self, body: bytes) -> None:
        """More text. After the end nothing is added."""
        if not self.ended:
            self._unsent += body

    def end(self) -> None:
        self.ended = True

    def refuse(self, status: int, body: bytes, content_type: str) -> None:
        """The whole reply is an error. Only before it has started."""
        assert not self.started
        self.status, self.content_type = status, content_type
        self.say(body)
        self.end()

    def take(self) -> Message:
        body = bytes(self._unsent[: self._max_bytes])
        del self._unsent[: self._max_bytes]
        end: bool | None = self.ended and not self._unsent
        if end and not self.sent:
            end = False if self.begun else None
        self.sent = True
        return Message(body, end, self.status, self.content_type)
