"""haystack: its chat generators."""

from __future__ import annotations

from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret
from trial import MODEL, WEATHER_QUESTION, WEATHER_SCHEMA, check_weather, run

WEATHER_TOOL = Tool("get_weather", "The weather of a city", WEATHER_SCHEMA, lambda city, days: "sunny")


def ask(
    url: str, kind: type = OpenAIChatGenerator, callback: object = None, tools: object = None, **options: object
) -> ChatMessage:
    generator = kind(
        api_key=Secret.from_token("none"), model=MODEL, api_base_url=f"{url}/v1", generation_kwargs=options,
        streaming_callback=callback, tools=tools, max_retries=0,
    )  # fmt: skip
    return generator.run([ChatMessage.from_user(WEATHER_QUESTION)])["replies"][0]


def chat(url: str) -> None:
    assert ask(url, max_tokens=32).text


def stream(url: str) -> None:
    pieces = []
    assert ask(url, callback=pieces.append, max_tokens=32).text
    assert len(pieces) > 2


def tools(url: str) -> None:
    for callback in (None, lambda chunk: None):
        answer = ask(url, callback=callback, tools=[WEATHER_TOOL], max_tokens=64, tool_choice="required")
        check_weather(answer.tool_calls[0].arguments)


def responses(url: str) -> None:
    assert ask(url, OpenAIResponsesChatGenerator, max_output_tokens=32).text
    answer = ask(url, OpenAIResponsesChatGenerator, tools=[WEATHER_TOOL], max_output_tokens=64, tool_choice="required")
    check_weather(answer.tool_calls[0].arguments)


if __name__ == "__main__":
    run({"chat": chat, "streamed": stream, "tools, plain and streamed": tools, "responses": responses})
