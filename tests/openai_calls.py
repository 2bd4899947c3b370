"""OpenAI's two calls without HTTP, greedy and short unless a test says otherwise."""

from __future__ import annotations

from typing import Any

from calls import Alphabet
from paged_serving import (
    ChatCall,
    CompletionCall,
)


def complete(alphabet: Alphabet, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "A", "max_tokens": 5, "temperature": 0, **fields}
    return alphabet.answer(CompletionCall(body, alphabet.served, "1"))


def stream(alphabet: Alphabet, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": "A", "max_tokens": 5, "temperature": 0, "stream": True, **fields}
    return alphabet.chunks(CompletionCall(body, alphabet.served, "1"))


def chat(alphabet: Alphabet, **fields: Any) -> dict[str, Any]:
    return alphabet.answer(ChatCall(chat_body(**fields), alphabet.served, "1"))


def chat_stream(alphabet: Alphabet, **fields: Any) -> list[dict[str, Any]]:
    return alphabet.chunks(ChatCall(chat_body(**fields, stream=True), alphabet.served, "1"))


def chat_body(**fields: Any) -> dict[str, Any]:
    # The toy template ends with "assistant:", which the model continues after ":".
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0, **fields}


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["text"] for choice in choices)
