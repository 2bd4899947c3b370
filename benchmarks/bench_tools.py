"""Calls of tools under grammars: a small model, questions in the shapes of BFCL, and whether all calls are valid.

    python benchmarks/bench_tools.py [--questions 40] [--json FILE]

A ``paged serve`` of SmolLM2-135M-Instruct is asked through openai's client, greedily. Its own chat template knows no
tools, so it is given one that writes them as Hermes' models do; it was not trained for them, and what it chooses means
little. What counts: with ``required``, a named function or strict tools every call names a tool that there is, and its
arguments follow that tool's JSON schema (checked by jsonschema-rs, of the group "test"). "free" has no grammar, and
shows what the model does by itself.

The shapes are those of the Berkeley Function Calling Leaderboard (simple, multiple, parallel, nested, irrelevant); the
questions are our own, made from one seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema_rs
import openai

from paged_bench.report import cpu_name
from paged_hf import embedded_folder

CHAT = """{%- if tools %}<|im_start|>system
You may call these functions:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
For each call, write a JSON object with its name and arguments:
<tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CITIES = ("Paris", "Rome", "Oslo", "Lima", "Kyoto")
_START_LIMIT_S = 300


class Question(NamedTuple):
    """What is asked, with which tools, and which of them would be right."""

    shape: str
    text: str
    tools: list[dict[str, Any]]
    right: str | None


def main() -> int:
    args = _arguments()
    questions = make_questions(args.questions)
    modes = {mode: [] for mode in ("free", "strict", "required", "named")}
    with serving(args.port) as client:
        for mode, answers in modes.items():
            began = time.perf_counter()
            for question in questions:
                answers.append(ask(client, question, mode))
            _print_row(mode, questions, answers, time.perf_counter() - began)
    rows = {mode: summary(questions, answers) for mode, answers in modes.items()}
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


def ask(client: openai.OpenAI, question: Question, mode: str) -> Any:
    tools = [{**tool, "function": {**tool["function"], "strict": mode == "strict"}} for tool in question.tools]
    named = {"type": "function", "function": {"name": question.right or tools[0]["function"]["name"]}}
    choice: Any = {"required": "required", "named": named}.get(mode, "auto")
    answer = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": question.text}], tools=tools, tool_choice=choice,
        temperature=0, max_tokens=200,
    )  # fmt: skip
    return answer.choices[0]


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


def _print_row(mode: str, questions: Sequence[Question], answers: Sequence[Any], seconds: float) -> None:
    told = ", ".join(f"{number} {what}" for what, number in summary(questions, answers).items())
    print(f"{mode}: {told}; {seconds:.0f} s", flush=True)


@contextmanager
def serving(port: int) -> Iterator[openai.OpenAI]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        for path in embedded_folder().iterdir():
            if path.name != "chat_template.jinja":
                (model / path.name).symlink_to(path)
        (model / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
        command = [sys.executable, "-m", "paged_openai", "--model", folder, "--served-model-name", "smollm2",
                   "--port", str(port), "--max-model-len", "2048", "--log-level", "error"]  # fmt: skip
        process = subprocess.Popen(command)
        try:
            _wait(f"http://127.0.0.1:{port}/ready", process)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600) as client:
                yield client
        finally:
            process.terminate()
            process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < ends and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
