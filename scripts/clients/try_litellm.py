"""litellm: chats, streams, tools, responses, messages, and the error of a prompt that is too long."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
from trial import MODEL, WEATHER, WEATHER_QUESTION, check_weather, run


def asked(url: str, **more: Any) -> dict[str, Any]:
    given = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 64, "num_retries": 0}
    return {**given, "messages": [{"role": "user", "content": WEATHER_QUESTION}], **more}


def chat(url: str) -> None:
    assert litellm.completion(**asked(url)).choices[0].message.content


def stream(url: str) -> None:
    chunks = list(litellm.completion(**asked(url, stream=True)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def tools(url: str) -> None:
    (choice,) = litellm.completion(**asked(url, tools=[WEATHER], tool_choice="required")).choices
    check_weather(json.loads(choice.message.tool_calls[0].function.arguments))


def streamed_tools(url: str) -> None:
    chunks = list(litellm.completion(**asked(url, tools=[WEATHER], tool_choice="required", stream=True)))
    (choice,) = litellm.stream_chunk_builder(chunks).choices
    check_weather(json.loads(choice.message.tool_calls[0].function.arguments))


def as_vllm(url: str) -> None:
    assert litellm.completion(**asked(url, model=f"hosted_vllm/{MODEL}")).choices[0].message.content


def responses(url: str) -> None:
    given = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none", "max_output_tokens": 32}
    first = litellm.responses(input="Hi", **given)
    assert first.output[0].content[0].text
    assert litellm.responses(input="And?", previous_response_id=first.id, **given).output


def messages(url: str) -> None:
    """Anthropic's form, which litellm translates."""
    answer = asyncio.run(litellm.anthropic.messages.acreate(**asked(url)))
    assert answer["content"][0]["text"]


def too_long(url: str) -> None:
    long = [{"role": "user", "content": "word " * 9000}]
    try:
        litellm.completion(**asked(url, messages=long))
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("it was answered")


if __name__ == "__main__":
    run({
        "chat": chat, "streamed": stream, "tools": tools, "tools, streamed": streamed_tools, "as vLLM": as_vllm,
        "responses, one after another": responses, "messages": messages, "a prompt that is too long": too_long,
    })  # fmt: skip
