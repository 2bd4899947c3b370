"""Variables of the chat template beside the messages: whoever gives them, some names are not free."""

from __future__ import annotations

from collections.abc import Iterable

_OURS = (
    "self", "messages", "conversation", "tokenize", "chat_template", "add_generation_prompt", "continue_final_message",
    "tools", "documents",
)  # fmt: skip
_RETURNS = ("return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length")


def taken_name(names: Iterable[str]) -> str | None:
    """The first of ``names`` that would replace the template itself, or what the server says or gets by it."""
    return next((name for name in names if name in _OURS + _RETURNS or name.startswith("_")), None)
