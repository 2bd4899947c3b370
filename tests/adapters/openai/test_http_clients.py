"""The clients that people have: openai's, plain and streamed, sync and async; huggingface_hub's; a scraper."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import GenerationError, ValidationError
from prometheus_client.parser import text_string_to_metric_families

import paged_core
from alphabet_model import AlphabetModel, Gate
from http_server import Running, alphabet_server, until
from paged_openai.app import _FOR_OTHER_MODELS


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


# ---- TGI's and vLLM's other routes -------------------------------------------------------------------------------


def test_generate_answers_with_one_object_and_generate_stream_with_events(server: Running) -> None:
    body = {"inputs": "A", "parameters": {"max_new_tokens": 2}}
    with server.client() as client:
        assert client.post("/generate", json=body).json() == {"generated_text": "BC"}
        assert client.post("/", json=body).json() == [{"generated_text": "BC"}]
        streamed = client.post("/generate_stream", json=body)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert [line[:6] for line in streamed.text.splitlines() if line] == ["data: "] * 2
        assert "[DONE]" not in streamed.text


def test_info_names_the_model_and_its_limits(server: Running) -> None:
    with server.client() as client:
        info = client.get("/info").json()
    assert info["model_id"] == "alphabet"
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (255, 256)
    assert info["model_device_type"] == "cpu"


def test_tokenize_knows_both_forms(server: Running) -> None:
    with server.client() as client:
        assert client.post("/tokenize", json={"inputs": "AB"}).json() == [
            {"id": 33, "text": "A", "start": 0, "stop": 1}, {"id": 34, "text": "B", "start": 1, "stop": 2},
        ]  # fmt: skip
        found = client.post("/tokenize", json={"model": "alphabet", "prompt": "AB"}).json()
        assert found == {"count": 2, "max_model_len": 256, "tokens": [33, 34]}
        assert client.post("/tokenize", json={}).status_code == 422


def test_messages_are_tokenised_as_a_chat_has_them(server: Running) -> None:
    with server.client() as client:
        body = {"model": "alphabet", "messages": MESSAGES, "return_token_strs": True}
        found = client.post("/tokenize", json=body).json()
        asked = {"messages": MESSAGES, "max_tokens": 1, "return_token_ids": True}
        chat = client.post("/v1/chat/completions", json=asked).json()
        assert found["tokens"] == chat["prompt_token_ids"]
        assert found["count"] == len(found["token_strs"]) == chat["usage"]["prompt_tokens"]
        closed = client.post("/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False}).json()
        assert closed["tokens"] == found["tokens"][: closed["count"]] != found["tokens"]
        for wrong, named in (
            ({"messages": MESSAGES, "prompt": "A"}, "messages can't go with prompt"),
            ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
            ({"messages": [], "inputs": "A"}, "messages can't go with inputs"),
            ({"messages": MESSAGES * 300}, "messages holds 300 objects"),
        ):
            refused = client.post("/tokenize", json=wrong)
            assert refused.status_code == 422
            assert named in refused.json()["error"]


def test_detokenize_gives_the_text_back(server: Running) -> None:
    with server.client() as client:
        assert client.post("/detokenize", json={"model": "alphabet", "tokens": [33, 34]}).json() == {"prompt": "AB"}
        assert client.post("/detokenize", json={"tokens": [500]}).status_code == 422
        assert client.post("/detokenize", json={"tokens": [33] * 300}).status_code == 422


def test_the_small_routes_that_probes_and_balancers_ask(server: Running) -> None:
    with server.client() as client:
        assert client.get("/version").json() == {"version": paged_core.__version__}
        assert client.get("/ping").status_code == client.post("/ping").status_code == 200
        assert client.get("/load").json() == {"server_load": 0}
        assert client.get("/v1/models/").json() == client.get("/v1/models").json()
        lost = client.get("/")
        assert (lost.status_code, lost.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("path", _FOR_OTHER_MODELS)
def test_what_needs_another_kind_of_model_is_told(server: Running, path: str) -> None:
    assert {"/v1/embeddings", "/rerank", "/score"} <= set(_FOR_OTHER_MODELS)
    with server.client() as client:
        response = client.post(path, json={"model": "alphabet", "input": "A"})
    assert response.status_code == 404
    assert "needs a model that embeds or scores texts" in response.text


def test_load_counts_what_is_under_way(gate: Gate) -> None:
    with alphabet_server(AlphabetModel(gate)) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        gate.shut()
        answer = pool.submit(client.post, "/v1/completions", json={"prompt": "A", "max_tokens": 3, "n": 2, "seed": 1})
        until(lambda: gate.num_steps > 0)
        assert client.get("/load").json() == {"server_load": 2}
        gate.open()
        assert answer.result(30).status_code == 200


def test_a_scraper_reads_what_was_done(server: Running) -> None:
    with server.client() as client:
        client.post("/v1/completions", json={"prompt": "A", "max_tokens": 3})
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["vllm:generation_tokens"].samples[0].value >= 3
    assert families["tgi_request_count"].samples[0].value >= 1
    assert families["vllm:generation_tokens"].samples[0].labels == {"model_name": "alphabet", "engine": "0"}


def test_a_failed_generation_is_told_in_each_form() -> None:
    def fail(token_ids: list[int]) -> None:
        if 33 in token_ids:
            raise RuntimeError("this model can't say A")

    with alphabet_server(AlphabetModel(fail)) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="say A"):
                client.completions.create(model="alphabet", prompt="A")
            with pytest.raises(openai.APIError, match="say A"):
                # It fails after a few tokens: "@" is followed by "A".
                list(client.completions.create(model="alphabet", prompt="=", max_tokens=9, stream=True))
            assert client.completions.create(model="alphabet", prompt="B").choices[0].text
        with InferenceClient(server.url, token="none", timeout=30) as hub, pytest.raises(GenerationError):
            hub.text_generation("A")
