"""Reply: the messages to one client, in the form of TorchServe's frontend.

The frontend sends status and content type with a reply's first message. A message longer than its limit would kill
the worker: long replies are sent in pieces.
"""

from __future__ import annotations

from typing import NamedTuple

from paged_torchserve.requests import Carrier

MESSAGE_BYTES = 1 << 20


class ReplyMessage(NamedTuple):
    """One step's message to one client."""

    body: bytes
    end: bool | None  # None: this is the whole reply; True: its last message; False: more will follow
    status: int
    content_type: str


class Reply:
    """Filled by ``say`` and ``end``; ``take`` is called once a step.

    ``begun``: the frontend may have sent a beginning from another worker. A message marked as the whole reply would
    never end that answer.
    """

    def __init__(
        self,
        content_type: str,
        max_bytes: int = MESSAGE_BYTES,
        *,
        carrier: Carrier = Carrier.HTTP,
        begun: bool = False,
    ) -> None:
        self.begun = begun
        self.content_type = content_type  # may be changed until it has started
        self.status = 200  # goes out with the first message; of a begun reply it is never more: that would cut it
        self._max_bytes = max_bytes
        self._carrier = carrier
        self._unsent = bytearray()
        self.sent = False  # whether there has been a message
        self.ended = False

    @property
    def started(self) -> bool:
        """Whether status and content type were sent, or text that depends on them. A reply in one message can still be
        replaced until it is sent."""
        return self.begun or self.sent or (bool(self._unsent) and self._carrier is Carrier.HTTP)

    @property
    def has_news(self) -> bool:
        return self.ended or (bool(self._unsent) and self._carrier is Carrier.HTTP)

    @property
    def is_too_long(self) -> bool:
        """Whether it needs more messages than its carrier can send."""
        return self._carrier is not Carrier.HTTP and len(self._unsent) > self._max_bytes

    def say(self, body: bytes) -> None:
        """Add text. After the end nothing is added."""
        if not self.ended:
            self._unsent += body

    def end(self) -> None:
        self.ended = True

    def refuse(self, status: int, body: bytes, content_type: str) -> None:
        """Make the whole reply an error. Only before it has started."""
        assert not self.started
        self.status, self.content_type = status, content_type
        self._unsent.clear()
        self.say(body)
        self.end()

    def take(self) -> ReplyMessage | None:
        """The next message; None: there is none now."""
        if self._carrier is not Carrier.HTTP:
            return self._take_whole()
        body = bytes(self._unsent[: self._max_bytes])
        del self._unsent[: self._max_bytes]
        end: bool | None = self.ended and not self._unsent
        if end and not self.sent:
            end = False if self.begun else None
        self.sent = True
        return ReplyMessage(body, end, self.status, self.content_type)

    def _take_whole(self) -> ReplyMessage | None:
        if not self.ended:
            return None
        self.sent = True
        end = None if self._carrier is Carrier.WHOLE else True
        return ReplyMessage(bytes(self._unsent), end, self.status, self.content_type)
