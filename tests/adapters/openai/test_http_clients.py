"""The clients that people have: openai's, plain and streamed, sync and async; huggingface_hub's; a scraper."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

from http_server import Running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def hub(server: Running) -> Iterator[InferenceClient]:
    with InferenceClient(server.url, token="none", timeout=30) as client:
        yield client


MESSAGES: Any = [{"role": "user", "content": "Hi"}]


# ---- openai ------------------------------------------------------------------------------------------------------


def test_openai_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="alphabet", prompt=["A", "M"], max_tokens=3, n=2, logprobs=1, seed=1, extra_body={"top_k": 5}
    )
    assert [choice.text for choice in answer.choices] == ["BCD", "BCD", "NOP", "NOP"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["B", "C", "D"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 12)
    assert answer.id.startswith("cmpl-")


def test_openai_gets_vllms_beam_search(client: openai.OpenAI) -> None:
    body = {"use_beam_search": True, "length_penalty": 0.8}
    answer = client.completions.create(model="alphabet", prompt="A", max_tokens=3, n=3, extra_body=body)
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == "BCD"
    assert len(set(texts)) == 3
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="alphabet", prompt="A", n=3, stream=True, extra_body=body)
    assert refused.value.param == "stream"


def test_openai_hears_how_a_server_learns_to_read_calls(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="Give the server one: --response-template FILE") as refused:
        client.chat.completions.create(model="alphabet", messages=MESSAGES, tools=[tool], tool_choice="auto")
    assert refused.value.param == "tools"


def test_openai_streams_completions(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="alphabet", prompt=["A", "M", "a"], max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    texts, usage = ["", "", ""], None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage
    assert texts == ["BCDE", "NOPQ", "bcde"]
    assert usage is not None
    assert usage.completion_tokens == 12


def test_openai_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="alphabet", messages=MESSAGES, max_completion_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ";<=>")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_openai_streams_chats(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="alphabet", messages=MESSAGES, max_tokens=4, n=2, stream=True)
    texts, ends = ["", ""], []
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends.append(choice.finish_reason)
    assert texts == [";<=>"] * 2
    assert ends.count("length") == 2


def test_openais_helper_for_streams_assembles_the_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="alphabet", messages=MESSAGES, stop=">") as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == ";<="


def test_many_async_openai_streams_at_once(server: Running) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        prompt = chr(65 + number % 20)
        if number % 2:
            plain = await client.completions.create(model="alphabet", prompt=prompt, max_tokens=6)
            return plain.choices[0].text
        stream = await client.completions.create(model="alphabet", prompt=prompt, max_tokens=6, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*[one(client, number) for number in range(60)])

    texts = asyncio.run(main())
    for number, text in enumerate(texts):
        first = 66 + number % 20
        assert text == "".join(chr(first + place) for place in range(6))
    server.come_to_rest()


def test_openai_lists_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object) == ("alphabet", "model")
    assert client.models.retrieve("alphabet").id == "alphabet"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openais_errors_are_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="alphabet", prompt="A", suffix="end")
    assert refused.value.param == "suffix"
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="at most 255") as refused:
        client.completions.create(model="alphabet", prompt="A" * 300, stream=True)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.completions.create(model="other", prompt="A")


def test_what_only_the_engine_can_refuse_is_a_400_too_even_of_a_stream(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="ids go from 0 to 96"):
            client.completions.create(model="alphabet", prompt=[500], stream=stream)
        with pytest.raises(openai.APIError, match="ids go from 0 to 96"):  # the first prompt may have been answered
            list(client.completions.create(model="alphabet", prompt=[[33], [500]], stream=stream))


# ---- huggingface_hub ---------------------------------------------------------------------------------------------


def test_the_hubs_client_generates(hub: InferenceClient) -> None:
    assert hub.text_generation("A", max_new_tokens=3) == "BCD"
    assert hub.text_generation("A", max_new_tokens=9, stop=["D"], return_full_text=True) == "ABCD"
    output = hub.text_generation(
        "AB", max_new_tokens=3, details=True, decoder_input_details=True, do_sample=True, seed=3, top_n_tokens=2
    )
    assert output.generated_text == "CDE"
    assert output.details is not None
    assert (output.details.finish_reason, output.details.generated_tokens, output.details.seed) == ("length", 3, 3)
    assert [token.text for token in output.details.prefill] == ["A", "B"]
    assert [token.text for token in output.details.tokens] == ["C", "D", "E"]


def test_the_hubs_client_streams(hub: InferenceClient) -> None:
    assert list(hub.text_generation("A", max_new_tokens=3, stream=True)) == ["B", "C", "D"]
    chunks = list(hub.text_generation("A", max_new_tokens=3, stream=True, details=True))
    assert [(chunk.index, chunk.token.text, chunk.generated_text) for chunk in chunks] == [
        (1, "B", None), (2, "C", None), (3, "D", "BCD"),
    ]  # fmt: skip
    assert chunks[-1].details is not None
    assert (chunks[-1].details.finish_reason, chunks[-1].details.input_length) == ("length", 1)


def test_the_hubs_async_client_generates_and_streams(server: Running) -> None:
    async def main() -> None:
        async with AsyncInferenceClient(server.url, token="none", timeout=30) as client:
            assert await client.text_generation("A", max_new_tokens=3) == "BCD"
            stream = await client.text_generation("A", max_new_tokens=3, stream=True)
            assert [text async for text in stream] == ["B", "C", "D"]

    asyncio.run(main())


def test_the_hubs_client_chats(server: Running) -> None:
    with InferenceClient(base_url=f"{server.url}/v1", api_key="none", timeout=30) as client:
        answer = client.chat_completion(MESSAGES, model="alphabet", max_tokens=4)
        assert answer.choices[0].message.content == ";<=>"
        chunks = client.chat_completion(MESSAGES, model="alphabet", max_tokens=4, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ";<=>"


def test_the_hubs_client_knows_our_errors(hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match=r"parameters\.watermark"):
        hub.text_generation("A", watermark=True)


def test_the_hubs_client_asks_for_a_schema(server: Running) -> None:
    """It sends OpenAI's json_schema as TGI has it."""
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "ab"}, "strict": True}}
    with InferenceClient(base_url=f"{server.url}/v1", api_key="none", timeout=30) as client:
        answer = client.chat_completion(MESSAGES, model="alphabet", max_tokens=9, response_format=schema)
    assert answer.choices[0].message.content == '"ab"'


def test_our_url_is_the_models_name_too(server: Running) -> None:
    """Hugging Face's JavaScript client calls the model of an endpoint by the endpoint's URL."""
    with server.client() as client:
        for name, status in ((server.url, 200), (f"{server.url}/v1", 200), ("https://elsewhere.example/v1", 404)):
            body = {"model": name, "messages": MESSAGES, "max_tokens": 2}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == status
            assert status == 404 or answer.json()["model"] == "alphabet"


def test_litellm_finds_the_words_it_looks_for_in_a_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        client.completions.create(model="alphabet", prompt="A" * 300)
