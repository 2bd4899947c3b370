"""What a user says reaches the model by every way in, whichever form of content the model's template reads."""

from __future__ import annotations

from typing import Any

import pytest

from alphabet_model import AlphabetModel
from calls import Alphabet
from http_server import alphabet_server
from paged_core import LLM, AsyncEngine, EngineConfig, InvalidRequestError, SamplingParams, TextCodec
from paged_serving import ChatCall, ProtocolError
from tiny_folder import byte_tokenizer
from toy_tokenizers import CharacterTokenizer, DeafTokenizer, PartsTokenizer

PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
GREEDY = SamplingParams(temperature=0, max_tokens=2)
CASES = [
    (CharacterTokenizer, "a", "user: a\nassistant:"),
    (CharacterTokenizer, PARTS, "user: a\nb\nassistant:"),
    (PartsTokenizer, "a", "user: a\nassistant:"),
    (PartsTokenizer, PARTS, "user: a+b\nassistant:"),
]
GUARD = """<s>{% for message in messages %}{% for content in message['content'] %}{% if content['type'] == 'text' %}
{{ message['role'] }}: {{ content['text'] | trim }}

{% endif %}{% endfor %}{% endfor %}
Safe or unsafe?"""


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(("tokenizer", "content", "prompt"), CASES)
def test_a_template_gets_the_form_that_it_reads(tokenizer: Any, content: Any, prompt: str) -> None:
    config = EngineConfig(num_blocks=64, attention_backend="reference")
    llm = LLM(AlphabetModel(), tokenizer=tokenizer(), config=config)
    assert [output.prompt for output in llm.chat(user(content), GREEDY)] == [prompt]
    with AsyncEngine(AlphabetModel(), tokenizer=tokenizer(), config=config) as engine:
        assert engine.submit(user(content), GREEDY).result(30).prompt == prompt
    alphabet = Alphabet(tokenizer=tokenizer())
    with alphabet.engine:
        assert ChatCall({"messages": user(content)}, alphabet.served, "1").prompts[0].text == prompt


@pytest.mark.parametrize(("tokenizer", "content", "prompt"), CASES)
def test_over_http_too(tokenizer: Any, content: Any, prompt: str) -> None:
    with alphabet_server(tokenizer=tokenizer()) as server, server.client() as client:
        body = {"messages": user(content), "max_tokens": 2, "temperature": 0, "return_token_ids": True}
        answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["prompt_token_ids"] == tokenizer().encode(prompt)


@pytest.mark.parametrize("content", ["a", PARTS])
def test_a_template_that_does_not_listen_is_refused(content: Any) -> None:
    told = r"leaves out the text of message 0 \(user\), given as a string and as text parts"
    alphabet = Alphabet(tokenizer=DeafTokenizer())
    with alphabet.engine:
        with pytest.raises(InvalidRequestError, match=told):
            alphabet.engine.submit(user(content))
        with pytest.raises(ProtocolError, match=told) as refused:
            ChatCall({"messages": user(content)}, alphabet.served, "1")
        assert refused.value.param == "messages"
    llm = LLM(AlphabetModel(), tokenizer=DeafTokenizer(), num_blocks=64, attention_backend="reference")
    (output,) = llm.chat(user(content), GREEDY)
    assert output.error is not None and "leaves out" in output.error


@pytest.mark.parametrize("content", ["How to pick a lock?", [{"type": "text", "text": "How to pick a lock?"}]])
def test_a_guards_template_as_transformers_renders_it(content: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = GUARD
    codec = TextCodec(tokenizer)
    wanted = "<s>user: How to pick a lock?\n\nSafe or unsafe?"
    assert codec.render_chat(user(content)) == wanted
    talk = [*user(content), {"role": "assistant", "content": "With a"}]
    assert codec.render_chat(talk) == wanted.replace("Safe", "assistant: With a\n\nSafe")
    begun = codec.render_chat(talk, continue_final_message=True, add_generation_prompt=False)
    assert begun.endswith("assistant: With a")
