"""llama-index, for servers that are like OpenAI's."""

from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from trial import MODEL, WEATHER_QUESTION, run


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def get_weather(city: Literal["Paris", "Rome"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def model(url: str, **options: object) -> OpenAILike:
    return OpenAILike(
        model=MODEL, api_base=f"{url}/v1", api_key="none", max_tokens=64, max_retries=0,
        is_chat_model=True, is_function_calling_model=True, **options,
    )  # fmt: skip


def chat(url: str) -> None:
    assert model(url).chat([ChatMessage(role="user", content="Hi")]).message.content


def stream(url: str) -> None:
    *_, last = model(url).stream_chat([ChatMessage(role="user", content="Hi")])
    assert last.message.content


def complete(url: str) -> None:
    assert OpenAILike(model=MODEL, api_base=f"{url}/v1", api_key="none", max_tokens=16).complete("A colour is").text


def an_object(url: str) -> None:
    answer = model(url).as_structured_llm(Weather).complete(WEATHER_QUESTION)
    assert isinstance(answer.raw, Weather)


def tools(url: str) -> None:
    asking = model(url)
    tool = FunctionTool.from_defaults(get_weather)
    answer = asking.chat_with_tools([tool], WEATHER_QUESTION, tool_required=True)
    (call, *_) = asking.get_tool_calls_from_response(answer)
    assert call.tool_kwargs["city"] in ("Paris", "Rome")


if __name__ == "__main__":
    run({
        "chat": chat, "streamed": stream, "completions": complete, "an object, by a tool (default)": an_object,
        "tools": tools,
    })  # fmt: skip
