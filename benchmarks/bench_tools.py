"""Calls of tools under grammars: a small model, questions in the shapes of BFCL, and whether all calls are valid.

    python benchmarks/bench_tools.py [--questions 40] [--json FILE]

A ``paged serve`` of SmolLM2-135M-Instruct is asked through openai's client, greedily. Its own chat template does not
support tools, so it gets one that writes them as Hermes' models do. The model was not trained for tools, and its
choices mean little; each question follows two examples of calls, because it would seldom call otherwise. The result is:
with ``required``, a named function or strict tools, every call names an existing tool, and its arguments follow that
tool's JSON schema (checked by jsonschema-rs, of the group "test"). "free" has no grammar, and shows what the model does
by itself.

The shapes are those of the Berkeley Function Calling Leaderboard (simple, multiple, parallel, nested, irrelevant); the
questions are our own, made from one seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema_rs
import openai

from paged_bench.report import cpu_name
from tool_server import serving

CITIES = ("Paris", "Rome", "Oslo", "Lima", "Kyoto")
_SHOWN = (
    ("Is it late?", "get_time", '{"zone": "UTC"}', "14:05"),
    ("What is a euro in yen?", "get_rate", '{"of": "EUR"}', "170"),
)
_AT_ONCE = 16


class Question(NamedTuple):
    """A question, its tools, and the correct ones among them."""

    shape: str
    text: str
    tools: list[dict[str, Any]]
    right: str | None


def main() -> int:
    args = _arguments()
    questions = make_questions(args.questions)
    rows = {}
    with serving(args.port) as url, _client(url) as client, ThreadPoolExecutor(_AT_ONCE) as pool:
        for mode in ("free", "strict", "required", "named"):
            began = time.perf_counter()
            answers = list(pool.map(lambda question, mode=mode: ask(client, question, mode), questions))
            rows[mode] = summary(questions, answers)
            told = ", ".join(f"{number} {what}" for what, number in rows[mode].items())
            print(f"{mode}: {told}; {time.perf_counter() - began:.0f} s", flush=True)
    if args.json is not None:
        facts = {"date": datetime.now(timezone.utc).isoformat(), "cpu": cpu_name(), "python": platform.python_version()}
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    forced = (rows[mode] for mode in ("strict", "required", "named"))
    return 0 if all(row["valid"] == row["calls"] for row in forced) else 1


# ---- questions ---------------------------------------------------------------------------------------------------


def make_questions(num: int, seed: int = 7) -> list[Question]:
    chance = random.Random(seed)
    shapes = (_simple, _multiple, _parallel, _nested, _irrelevant)
    return [shapes[number % len(shapes)](chance) for number in range(num)]


def _tool(name: str, description: str, required: Sequence[str], **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _weather() -> dict[str, Any]:
    days = {"type": "integer", "minimum": 1, "maximum": 14}
    return _tool("get_weather", "The weather of a city", ["city"], city={"enum": list(CITIES)}, days=days)


def _sum() -> dict[str, Any]:
    number = {"type": "integer", "minimum": 0, "maximum": 999}
    return _tool("add", "The sum of two numbers", ["a", "b"], a=number, b=number)


def _light() -> dict[str, Any]:
    return _tool("switch_light", "Turns a lamp on or off", ["on"], on={"type": "boolean"})


def _booking() -> dict[str, Any]:
    name, age = {"type": "string", "pattern": "^[A-Z][a-z]{1,10}$"}, {"type": ["integer", "null"]}
    guest = {
        "type": "object",
        "properties": {"name": name, "age": age},
        "required": ["name"],
        "additionalProperties": False,
    }
    guests = {"type": "array", "items": guest, "minItems": 1, "maxItems": 2}
    room, city = {"anyOf": [{"const": "single"}, {"const": "double"}]}, {"enum": list(CITIES)}
    return _tool("book_room", "Books a hotel room", ["city", "guests"], city=city, guests=guests, room=room)


def _simple(chance: random.Random) -> Question:
    city = chance.choice(CITIES)
    return Question("simple", f"What is the weather in {city} tomorrow?", [_weather()], "get_weather")


def _multiple(chance: random.Random) -> Question:
    text = f"How much is {chance.randrange(99)} plus {chance.randrange(99)}?"
    return Question("multiple", text, [_weather(), _light(), _sum()], "add")


def _parallel(chance: random.Random) -> Question:
    one, two = chance.sample(CITIES, 2)
    return Question("parallel", f"Tell me the weather in {one} and in {two}.", [_weather(), _sum()], "get_weather")


def _nested(chance: random.Random) -> Question:
    text = f"Book a double room in {chance.choice(CITIES)} for Ann, who is {chance.randrange(20, 60)}."
    return Question("nested", text, [_booking(), _light()], "book_room")


def _irrelevant(chance: random.Random) -> Question:
    return Question("irrelevant", f"Write a line about the number {chance.randrange(99)}.", [_light()], None)


# ---- asking ------------------------------------------------------------------------------------------------------


def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)


def ask(client: openai.OpenAI, question: Question, mode: str, *, model: str = "smollm2", most: int = 128) -> Any:
    tools = [{**tool, "function": {**tool["function"], "strict": mode == "strict"}} for tool in question.tools]
    named = {"type": "function", "function": {"name": question.right or tools[0]["function"]["name"]}}
    choice: Any = {"required": "required", "named": named}.get(mode, "auto")
    answer = client.chat.completions.create(
        model=model, messages=[*examples(), {"role": "user", "content": question.text}], tools=tools,
        tool_choice=choice, temperature=0, max_tokens=most,
    )  # fmt: skip
    return answer.choices[0]


def examples() -> list[Any]:
    """Earlier calls of the conversation, each with its result."""
    messages: list[Any] = []
    for number, (text, name, arguments, answer) in enumerate(_SHOWN):
        call = {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": answer},
        ]
    return messages


def is_valid(question: Question, call: Any) -> bool:
    """Whether it names one of the tools, and its arguments follow the schema."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in question.tools}
    schema = schemas.get(call.function.name)
    return schema is not None and jsonschema_rs.is_valid(schema, json.loads(call.function.arguments))


def summary(questions: Sequence[Question], answers: Sequence[Any]) -> dict[str, int]:
    calls = [(question, call) for question, choice in zip(questions, answers, strict=True)
             for call in choice.message.tool_calls or ()]  # fmt: skip
    return {
        "questions": len(questions),
        "answers that call": sum(bool(choice.message.tool_calls) for choice in answers),
        "calls": len(calls),
        "valid": sum(is_valid(question, call) for question, call in calls),
        "of the right tool": sum(call.function.name == question.right for question, call in calls),
        "cut": sum(choice.finish_reason == "length" for choice in answers),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
