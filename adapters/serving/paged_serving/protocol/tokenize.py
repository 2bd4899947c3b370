"""POST /tokenize, as TGI's clients ask for it (``inputs``) and as vLLM's do (``prompt``)."""

from __future__ import annotations

from typing import Any

from paged_serving.protocol.bodies import Body
from paged_serving.protocol.parsing import refuse
from paged_serving.protocol.reading import read_body
from paged_serving.protocol.served import ServedModel


class TokenizeBody(Body, frozen=True):
    inputs: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    model: str | None = None


def tokenize(body: Any, served: ServedModel) -> Any:
    """The answer to ``body``.

    Raises:
        ProtocolError: it holds no text, or more than can be served, or a field that isn't known.
    """
    asked = read_body(TokenizeBody, body, served)
    served.check_name(asked.model)
    if asked.inputs is not None and asked.prompt is not None:
        refuse("prompt", "can't go with inputs: they are two names for the text")
    text = asked.prompt if asked.inputs is None else asked.inputs
    if text is None:
        refuse("inputs", "is missing; it must be a string")
    ids = served.encode(text, add_special_tokens=asked.add_special_tokens).token_ids
    served.check_length("prompt" if asked.inputs is None else "inputs", len(ids))
    if asked.inputs is not None:
        return _with_places(ids, served)
    return {"count": len(ids), "max_model_len": served.max_model_len, "tokens": ids}


def _with_places(ids: list[int], served: ServedModel) -> list[dict[str, Any]]:
    """Each token with its place in the decoded text; a character of several tokens stands with its last."""
    detokenizer = served.codec.detokenizer(skip_special_tokens=True)
    tokens, start = [], 0
    for token in ids:
        stop = start + len(detokenizer.push([token]))
        tokens.append({"id": token, "text": served.tokens[token], "start": start, "stop": stop})
        start = stop
    return tokens
