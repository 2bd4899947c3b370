"""Turns prompts in all accepted forms into token ids: text, ids, chat messages, vLLM's dicts, a tokenizer's result.

Values that only look like prompts are refused: neither the keys of a dict nor the numbers of a byte string are ever
completed. This file knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from paged_core.errors import InvalidRequestError
from paged_core.text.codec import Prompt, TextCodec

_FORMS = (
    "give a string, token ids, a list of chat messages, a dict with prompt or prompt_token_ids, or a tokenizer's result"
)
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "prompt_embeds", "encoder_prompt", "decoder_prompt", "input_ids")
_OF_ENCODINGS = ("input_ids", "attention_mask")
_REMARKS = ("token_type_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length")
_BYTES = (bytes, bytearray, memoryview)


def encode_prompt(codec: TextCodec, prompt: Any) -> Prompt:
    """Return one prompt as token ids. A Prompt is returned as it is.

    Args:
        prompt: a string; token ids (a sequence, an array or a tensor [L]); chat messages (dicts with role and content),
            or one of them; ``{"prompt": str}`` or ``{"prompt_token_ids": ids}``, as in vLLM; or the result of a Hugging
            Face tokenizer for one text.

    Raises:
        InvalidRequestError: it is none of these, it is empty, or it is text and there is no tokenizer.
    """
    if isinstance(prompt, Prompt):
        found = prompt
    elif isinstance(prompt, str):
        found = Prompt(prompt, codec.encode(prompt))
    elif isinstance(prompt, Mapping):
        found = _encode_dict(codec, prompt)
    elif _is_conversation(prompt):
        text = codec.render_chat(prompt)
        found = Prompt(text, codec.encode(text, add_special_tokens=False))
    else:
        found = Prompt(None, _token_ids("the prompt", prompt))
    if not found.token_ids:
        raise InvalidRequestError("the prompt is empty: it must hold at least one token")
    return found


def as_prompts(prompts: Any) -> list[Any]:
    """Turn one prompt or several into a list of prompts, each for ``encode_prompt``.

    Raises:
        InvalidRequestError: it is neither, or a tokenizer's result that holds more than text.
    """
    if isinstance(prompts, (str, Prompt)):
        return [prompts]
    if isinstance(prompts, Mapping):
        return list(_rows(prompts)) if "input_ids" in prompts else [prompts]
    if hasattr(prompts, "tolist") and not isinstance(prompts, _BYTES):  # an array or a tensor: [L] or [N, L]
        prompts = prompts.tolist()
    if isinstance(prompts, (*_BYTES, AbstractSet)) or not isinstance(prompts, Iterable):
        raise InvalidRequestError(f"prompts is of type {type(prompts).__name__}; {_FORMS}, or a list of these")
    found = list(prompts)
    return [found] if found and (_is_token(found[0]) or _is_message(found[0])) else found


def as_conversations(messages: Any) -> list[Any]:
    """Turn one conversation or several into a list of conversations, each a list of messages.

    Raises:
        InvalidRequestError: one of them is no conversation.
    """
    if isinstance(messages, Mapping):
        messages = [messages]
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise InvalidRequestError(f"messages is of type {type(messages).__name__}; {_CHATS}")
    found = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
    for place, each in enumerate(found):
        if not _is_conversation(each) or not all(map(_is_message, each)):
            raise InvalidRequestError(f"conversation {place} is no list of messages; {_CHATS}")
    return found


_CHATS = "give a list of chat messages (dicts with role and content), or a list of such lists; generate takes text"


def _encode_dict(codec: TextCodec, prompt: Mapping[str, Any]) -> Prompt:
    given = {name: value for name, value in prompt.items() if value is not None}
    if "input_ids" in given:
        rows = _rows(given)
        if len(rows) != 1:
            raise InvalidRequestError(f"input_ids holds {len(rows)} prompts; give them one by one here")
        return Prompt(None, rows[0])
    if "role" in given:
        return encode_prompt(codec, [prompt])
    text, ids = given.pop("prompt", None), given.pop("prompt_token_ids", None)
    if given or (text is None and ids is None):
        raise InvalidRequestError(f"the prompt is a dict with {', '.join(map(repr, given)) or 'nothing'}; {_FORMS}")
    if not isinstance(text, str | None):
        raise InvalidRequestError(f"the prompt's 'prompt' is of type {type(text).__name__}; it must be a string")
    if ids is not None:
        return Prompt(text, _token_ids("prompt_token_ids", ids))
    assert text is not None, "one of the two is given"
    return Prompt(text, codec.encode(text))


def _rows(encoding: Mapping[str, Any]) -> list[list[int]]:
    """Return the prompts in a tokenizer's result, without their padding."""
    unread = [name for name in encoding if name not in _OF_ENCODINGS + _REMARKS and encoding[name] is not None]
    if unread:
        raise InvalidRequestError(f"the prompt holds {', '.join(unread)} beside input_ids; only text can be served")
    rows, mask = _row_lists("input_ids", encoding["input_ids"]), encoding.get("attention_mask")
    if mask is None:
        return rows
    masks = _row_lists("attention_mask", mask)
    if list(map(len, rows)) != list(map(len, masks)):
        raise InvalidRequestError("input_ids and attention_mask are of different sizes")
    return [
        [token for token, kept in zip(row, of_row, strict=True) if kept]
        for row, of_row in zip(rows, masks, strict=True)
    ]


def _row_lists(name: str, value: Any) -> list[list[int]]:
    """Return rows of ``value``: [L], or [N, L] with rows of any lengths."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Sequence) and value and not _is_token(value[0]):
        return [_token_ids(name, row) for row in value]
    return [_token_ids(name, value)]


def _token_ids(name: str, value: Any) -> list[int]:
    if hasattr(value, "tolist") and not isinstance(value, _BYTES):  # an array or a tensor
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, *_BYTES)):
        raise InvalidRequestError(f"{name} is of type {type(value).__name__}; {_FORMS}")
    for token in value:
        if not _is_token(token):
            raise InvalidRequestError(f"{name} holds {_short(token)}, which is neither a token id nor a chat message")
    return [token.__index__() for token in value]


def _is_token(value: Any) -> bool:
    """Return whether it is an integer: Python's, NumPy's, or a tensor with one."""
    return hasattr(value, "__index__") and not isinstance(value, bool) and not getattr(value, "ndim", 0)


def _is_message(value: Any) -> bool:
    """Return whether a dict is a chat message, or at least no prompt of another form."""
    return isinstance(value, Mapping) and ("role" in value or not any(name in value for name in _PROMPT_KEYS))


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
