"""instructor: answers as objects. Its default is a named tool."""

from __future__ import annotations

from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel
from trial import MODEL, WEATHER_QUESTION, run


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


ASKED = {
    "model": MODEL,
    "max_tokens": 64,
    "max_retries": 0,
    "messages": [{"role": "user", "content": WEATHER_QUESTION}],
}


def client(url: str, **options: object) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key="none"), **options)


def an_object(url: str) -> None:
    assert isinstance(client(url).create(response_model=Weather, **ASKED), Weather)


def as_it_grows(url: str) -> None:
    *_, last = client(url).create_partial(response_model=Weather, **ASKED)
    assert last.city in ("Paris", "Rome")


def by_schema(url: str) -> None:
    mode = instructor.Mode.JSON_SCHEMA
    assert isinstance(client(url, mode=mode).create(response_model=Weather, **ASKED), Weather)


if __name__ == "__main__":
    run(
        {
            "an object, by a tool (default)": an_object,
            "partial objects, streamed": as_it_grows,
            "by a schema": by_schema,
        }
    )
