"""pydantic-ai: an object comes of a tool that must be called."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from trial import MODEL, MOST, WEATHER_QUESTION, run


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def agent(url: str, kind: type, wanted: type) -> Agent:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    return Agent(kind(MODEL, provider=provider), output_type=wanted, model_settings={"max_tokens": MOST}, retries=0)


def text(url: str) -> None:
    assert agent(url, OpenAIChatModel, str).run_sync("Hi").output


def an_object(url: str) -> None:
    assert isinstance(agent(url, OpenAIChatModel, Weather).run_sync(WEATHER_QUESTION).output, Weather)


def responses(url: str) -> None:
    assert isinstance(agent(url, OpenAIResponsesModel, Weather).run_sync(WEATHER_QUESTION).output, Weather)


if __name__ == "__main__":
    run({"text": text, "an object, by a tool (default)": an_object, "an object, by responses": responses})
