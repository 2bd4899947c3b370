"""POST /tokenize, as TGI's clients ask for it (``inputs``) and as vLLM's do (``prompt``, ``messages``)."""

from __future__ import annotations

from typing import Any

from msgspec import field

from paged_serving.protocol.bodies import Body
from paged_serving.protocol.chat_body import ChatBody, ChatMessage, ChatTool, check_number, to_conversation
from paged_serving.protocol.parsing import refuse
from paged_serving.protocol.reading import read_body
from paged_serving.protocol.served import ServedModel
from paged_serving.protocol.talk import Fields, to_talk


class TokenizeBody(Body, frozen=True):
    inputs: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[ChatTool] = field(default_factory=list)  # this and what follows: of messages
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None  # None: to a text, and not to messages, whose template has them
    return_token_strs: bool = False  # vLLM's
    model: str | None = None


def tokenize(body: Any, served: ServedModel) -> Any:
    """The answer to ``body``.

    Raises:
        ProtocolError: it holds no text, or more than can be served, or a field that isn't known.
    """
    check_number(body, served)
    asked = read_body(TokenizeBody, body, served)
    served.check_name(asked.model)
    given = [name for name in ("inputs", "prompt", "messages") if getattr(asked, name) is not None]
    if not given:
        refuse("inputs", "is missing; it must be a string")
    if len(given) > 1:
        refuse(given[1], f"can't go with {given[0]}: each is what is to be tokenised")
    ids = _ids(asked, served)
    served.check_length(given[0], len(ids))
    if asked.inputs is not None:
        return _with_places(ids, served)
    texts = {"token_strs": [served.tokens[token] for token in ids]} if asked.return_token_strs else {}
    return {"count": len(ids), "max_model_len": served.max_model_len, "tokens": ids, **texts}


def _ids(asked: TokenizeBody, served: ServedModel) -> list[int]:
    """Of messages: the prompt that a chat would have."""
    special = asked.add_special_tokens
    if asked.messages is None:
        text = asked.prompt if asked.inputs is None else asked.inputs
        assert text is not None, "one of the three is there"
        return served.encode(text, add_special_tokens=special is not False).token_ids
    chat = ChatBody(
        messages=asked.messages,
        tools=asked.tools,
        add_generation_prompt=asked.add_generation_prompt,
        continue_final_message=asked.continue_final_message,
        chat_template_kwargs=asked.chat_template_kwargs,
    )
    return to_talk(to_conversation(chat), served, Fields(), add_special_tokens=special is True).prompt.token_ids


def _with_places(ids: list[int], served: ServedModel) -> list[dict[str, Any]]:
    """Each token with its place in the decoded text; a character of several tokens stands with its last."""
    detokenizer = served.codec.detokenizer(skip_special_tokens=True)
    tokens, start = [], 0
    for token in ids:
        stop = start + len(detokenizer.push([token]))
        tokens.append({"id": token, "text": served.tokens[token], "start": start, "stop": stop})
        start = stop
    return tokens
