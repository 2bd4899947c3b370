"""TGI's and vLLM's other routes, as probes, balancers and scrapers ask them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError
from prometheus_client.parser import text_string_to_metric_families

import paged_core
from alphabet_model import AlphabetModel, Gate
from http_server import Running, alphabet_server, until
from paged_openai.app import _FOR_OTHER_MODELS

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


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
