"""smolagents: its agent of tools, which must call one in each step, and its agent of code."""

from __future__ import annotations

from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool
from trial import MODEL, WEATHER_QUESTION, run


@tool
def get_weather(days: int) -> str:
    """The weather in Paris.

    Args:
        days: in how many days
    """
    return "sunny"


def model(url: str) -> OpenAIModel:
    return OpenAIModel(MODEL, api_base=f"{url}/v1", api_key="none", max_tokens=200)


def calls(url: str) -> None:
    agent = ToolCallingAgent(tools=[get_weather], model=model(url), max_steps=2)
    agent.run(WEATHER_QUESTION)
    assert any(getattr(step, "tool_calls", None) for step in agent.memory.steps), "no step has called"


def code(url: str) -> None:
    """A model as small as this one writes no code that runs: what counts is that every step was answered."""
    agent = CodeAgent(tools=[get_weather], model=model(url), max_steps=1)
    assert agent.run(WEATHER_QUESTION) is not None


if __name__ == "__main__":
    run({"an agent of tools (default)": calls, "an agent of code": code})
