"""What every client of ``make clients`` is asked for: runs in the client's own environment, beside nothing of ours.

Arguments: the server's URL and, if it isn't smollm2, the model's name.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from enum import Enum

WEATHER_QUESTION = "What is the weather in Paris in two days?"
MODEL = sys.argv[2] if len(sys.argv) > 2 else "smollm2"
MOST = 200  # tokens of an answer that follows a grammar: it ends by itself


class City(str, Enum):
    PARIS = "Paris"
    ROME = "Rome"


WEATHER_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER_SCHEMA}}


def check_weather(arguments: Mapping[str, object]) -> None:
    """Raises AssertionError for what ``get_weather`` could not be called with."""
    assert arguments["city"] in ("Paris", "Rome"), arguments
    assert type(arguments["days"]) is int, arguments


def run(trials: Mapping[str, Callable[[str], object]]) -> None:
    """One line of JSON for each: what was tried, and null or what went wrong."""
    for tried, trial in trials.items():
        wrong = None
        try:
            trial(sys.argv[1])
        except Exception as error:
            traceback.print_exc()
            wrong = f"{type(error).__name__}: {error}"
        print(json.dumps({"tried": tried, "wrong": wrong}), flush=True)
