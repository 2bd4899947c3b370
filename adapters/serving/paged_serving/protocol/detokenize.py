"""POST /detokenize, as vLLM's clients ask for it: token ids to text."""

from __future__ import annotations

from typing import Any

from paged_serving.protocol.bodies import Body, TokenIds
from paged_serving.protocol.reading import read_body
from paged_serving.protocol.served import ServedModel


class DetokenizeBody(Body, frozen=True):
    tokens: TokenIds
    model: str | None = None


def detokenize(body: Any, served: ServedModel) -> dict[str, str]:
    """The answer to ``body``. Special tokens are written out, so that /tokenize returns the same ids.

    Raises:
        ProtocolError: an id is outside the vocabulary, there are more than can be served, or a field isn't known.
    """
    asked = read_body(DetokenizeBody, body, served)
    served.check_name(asked.model)
    served.check_ids("tokens", asked.tokens)
    served.check_length("tokens", len(asked.tokens))
    return {"prompt": served.codec.decode(asked.tokens)}
