"""POST /tokenize, as TGI's clients ask for it (``inputs``) and as vLLM's do (``prompt``)."""

from __future__ import annotations

from typing import Any

from paged_serving.protocol.fields import fields_of
from paged_serving.protocol.served import ServedModel


def tokenize(body: Any, served: ServedModel) -> Any:
    """The answer to ``body``.

    Raises:
        ProtocolError: it holds no text, or more than can be served, or a field that isn't known.
    """
    fields = fields_of(body)
    inputs, prompt = fields.text("inputs"), fields.text("prompt")
    add_special_tokens = fields.flag("add_special_tokens", True)
    served.check_name(fields.text("model"))
    fields.finish()
    if inputs is not None and prompt is not None:
        raise fields.error("prompt", "can't go with inputs: they are two names for the text")
    text = prompt if inputs is None else inputs
    if text is None:
        raise fields.error("inputs", "is missing")
    ids = served.encode(text, add_special_tokens=add_special_tokens).token_ids
    served.check_length("prompt" if inputs is None else "inputs", len(ids))
    if inputs is not None:
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
