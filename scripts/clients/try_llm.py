"""llm, the command line's library: a model of ``extra-openai-models.yaml``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import llm
from trial import MODEL, WEATHER_QUESTION, run


def get_weather(city: str, days: int) -> str:
    """The weather of a city."""
    return "sunny"


def model(url: str) -> llm.Model:
    folder = Path(tempfile.mkdtemp())
    os.environ["LLM_USER_PATH"] = str(folder)
    fields = {
        "model_id": "ours",
        "model_name": MODEL,
        "api_base": f"{url}/v1",
        "supports_tools": "true",
        "supports_schema": "true",
    }
    lines = "\n  ".join(f"{name}: {value}" for name, value in fields.items())
    (folder / "extra-openai-models.yaml").write_text(f"- {lines}\n")
    return llm.get_model("ours")


def chat(url: str) -> None:
    assert model(url).prompt("Hi", stream=False, max_tokens=32, key="none").text()


def stream(url: str) -> None:
    assert "".join(model(url).prompt("Hi", max_tokens=32, key="none"))


def schema(url: str) -> None:
    wanted = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    assert "city" in model(url).prompt(WEATHER_QUESTION, schema=wanted, max_tokens=64, key="none").text()


def tools(url: str) -> None:
    """It lets the model choose, so all that can be asked for is an answer."""
    answer = model(url).prompt(WEATHER_QUESTION, tools=[get_weather], stream=False, max_tokens=64, key="none")
    assert answer.tool_calls() or answer.text()


if __name__ == "__main__":
    run({"chat": chat, "streamed (default)": stream, "a schema": schema, "tools the model may call": tools})
