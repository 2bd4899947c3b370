"""The questions of bench_tools, in the shapes of BFCL: under grammars every call is valid."""

from __future__ import annotations

import openai
import pytest

from bench_tools import ask, make_questions, summary
from hermes_model import SayingModel, hermes_tokenizer
from http_server import alphabet_server


@pytest.mark.parametrize("mode", ["required", "named", "strict"])
def test_calls_of_every_shape_are_valid(mode: str) -> None:
    model, questions = SayingModel(), make_questions(5)
    model.say('<tool_call>\n{"name": "nobody", "arguments": {"city": "Atlantis"}}')  # what no grammar here allows
    with (
        alphabet_server(model, tokenizer=hermes_tokenizer(), reasoning=False) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        answers = [ask(client, question, mode, model="alphabet", most=1000) for question in questions]
    told = summary(questions, answers)
    assert told["valid"] == told["calls"] >= told["answers that call"] == 5
