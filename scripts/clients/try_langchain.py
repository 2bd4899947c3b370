"""langchain-openai: chats, schemas (its default for structured output), tools, responses."""

from __future__ import annotations

from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from trial import MODEL, MOST, WEATHER, WEATHER_QUESTION, check_weather, run


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def model(url: str, **options: object) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", max_tokens=MOST, max_retries=0, **options)


def chat(url: str) -> None:
    assert model(url).invoke("Hi").content


def stream(url: str) -> None:
    assert "".join(chunk.text for chunk in model(url).stream("Hi"))


def an_object(url: str) -> None:
    assert isinstance(model(url).with_structured_output(Weather).invoke(WEATHER_QUESTION), Weather)


def an_object_by_a_tool(url: str) -> None:
    asking = model(url).with_structured_output(Weather, method="function_calling")
    assert isinstance(asking.invoke(WEATHER_QUESTION), Weather)


def tools(url: str) -> None:
    asking = model(url).bind_tools([WEATHER], tool_choice="required", parallel_tool_calls=False)
    answer = asking.invoke(WEATHER_QUESTION)
    check_weather(answer.tool_calls[0]["args"])
    told = ToolMessage("sunny", tool_call_id=answer.tool_calls[0]["id"])
    assert model(url).bind_tools([WEATHER]).invoke([HumanMessage(WEATHER_QUESTION), answer, told]) is not None


def responses(url: str) -> None:
    asking = model(url, use_responses_api=True)
    assert asking.invoke("Hi").text
    assert "".join(chunk.text for chunk in asking.stream("Hi"))
    check_weather(asking.bind_tools([WEATHER], tool_choice="required").invoke(WEATHER_QUESTION).tool_calls[0]["args"])


if __name__ == "__main__":
    run({
        "chat": chat, "streamed": stream, "an object, by a schema (default)": an_object,
        "an object, by a tool": an_object_by_a_tool, "tools, and their answers": tools, "responses": responses,
    })  # fmt: skip
