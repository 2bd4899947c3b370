"""OpenAI's chats without HTTP: answers and streams have the known shapes."""

from __future__ import annotations

from calls import Alphabet
from openai_calls import chat, chat_body, chat_stream
from paged_serving import (
    ChatCall,
)


def test_a_chat_answer_has_openais_shape(alphabet: Alphabet) -> None:
    answer = chat(alphabet, model="abc")
    assert (answer["id"], answer["object"], answer["model"]) == ("chatcmpl-1", "chat.completion", "abc")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": ";<=>", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["usage"]["prompt_tokens"] == len("user: Hi assistant:")


def test_a_chat_stream_says_who_speaks_then_what(alphabet: Alphabet) -> None:
    first, *others, last = chat_stream(alphabet, stream_options={"include_usage": True}, logprobs=True)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in others) == ";<=>"
    assert others[-1]["choices"][0]["finish_reason"] == "length"
    tokens = [entry["token"] for chunk in others for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert tokens == list(";<=>")
    assert [first["usage"], last["choices"], last["usage"]["completion_tokens"]] == [None, [], 4]


def test_chat_logprobs_come_with_bytes_and_the_likeliest(alphabet: Alphabet) -> None:
    logprobs = chat(alphabet, logprobs=True, top_logprobs=2, max_tokens=1)["choices"][0]["logprobs"]
    (entry,) = logprobs["content"]
    assert (entry["token"], entry["bytes"]) == (";", [ord(";")])
    assert entry["top_logprobs"][0]["token"] == ";"
    assert len(entry["top_logprobs"]) == 2
    assert chat(alphabet, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_text_parts_are_one_content(alphabet: Alphabet) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "bc"}]
    messages = [{"role": "user", "content": parts, "name": "Ann"}]
    answer = chat(alphabet, messages=messages)
    assert answer["usage"]["prompt_tokens"] == len("user: a bc assistant:")
    call = ChatCall(chat_body(messages=messages), alphabet.served, "1")
    assert call.prompts[0].text == "user: a\nbc\nassistant:"


def test_max_completion_tokens_goes_before_max_tokens(alphabet: Alphabet) -> None:
    assert chat(alphabet, max_completion_tokens=2)["usage"]["completion_tokens"] == 2
    body = {key: value for key, value in chat_body().items() if key != "max_tokens"}
    assert ChatCall(body, alphabet.served, "1").params.max_tokens == alphabet.served.limits.max_tokens


def test_an_answer_may_be_begun_by_the_caller(alphabet: Alphabet) -> None:
    call = ChatCall(chat_body(add_generation_prompt=False), alphabet.served, "1")
    assert call.prompts[0].text == "user: Hi\n"


def test_prompt_logprobs_of_a_chat_stream_come_with_its_first_news(alphabet: Alphabet) -> None:
    plain = chat(alphabet, prompt_logprobs=1, n=2, temperature=1)
    chunks = chat_stream(alphabet, prompt_logprobs=1, n=2, temperature=1)
    told = [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk]
    assert told == [plain["prompt_logprobs"]]
