"""Every door of a real TorchServe but plain REST: gRPC, workflows, KServe's and the oldest routes, curl's defaults; and
more workers than one. One server, whose config.properties say service_envelope=kserve and
decode_input_request=false for all models."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import tiny_folder
from paged_core.cli import main
from paged_torchserve.server import ServerOptions, TorchServe
from torchserve_grpc import Grpc
from torchserve_server import ENGINE, READY_S, Running, free_addresses, stock_generate
from waiting import until

NAMES = ["llama3-8b", "meta-llama/Meta-Llama-3.1-8B"]  # as the vLLM example's served_model_name has them
BODY = {"prompt": "Hello", "max_new_tokens": 9}
WORKFLOW = """
models:
  min-workers: 1
  max-workers: 1
  batch-size: 4
  max-batch-delay: 1
  retry-attempts: 1
  timeout-ms: 300000
  story:
    url: tiny.mar
dag:
  story: []
"""


@pytest.fixture(scope="module")
def stock() -> Callable[[str, int], str]:
    return stock_generate()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    tmp = tmp_path_factory.mktemp("torchserve")
    archive = tmp / "tiny.mar"
    names = ["--set", f"served_model_name={json.dumps(NAMES)}"]
    assert main(["torchserve", "archive", str(tiny_folder.save(tmp / "model")), str(archive), *ENGINE, *names]) == 0
    going = tmp / "going.mar"
    other = ["replicas=2", "device=cpu", "reply=json", "defaults={repetition_penalty: 1.3}"]
    settings = [word for setting in other for word in ("--set", setting)]
    assert main(["torchserve", "archive", str(tmp / "model"), str(going), *ENGINE, *settings]) == 0
    workflow(tmp / "workflow.war")
    properties = {"service_envelope": "kserve", "workflow_store": str(tmp), "ts_open_inference_protocol": "true",
                  "decode_input_request": "false"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        server = TorchServe(
            [archive, going], tmp / "work", ServerOptions(free_addresses(), model_api=True, properties=properties)
        )
    with server:
        server.wait_until_ready(READY_S)
        running = Running(server)
        with running.client:
            pid = running.worker("tiny")["pid"]
            yield running
            assert running.worker("tiny")["pid"] == pid, "the worker has died of something above"


def workflow(path: Path) -> None:
    """As torch-workflow-archiver makes it."""
    manifest = {"createdOn": "29/11/2026 12:00:00", "archiverVersion": "0.2.15", "workflow": {
        "workflowName": "workflow", "specFile": "workflow.yaml", "handler": "functions.py"}}  # fmt: skip
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("WAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("workflow.yaml", WORKFLOW)
        archive.writestr("functions.py", "")


# ---- gRPC ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remote(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grpc]:
    made = Grpc(tmp_path_factory.mktemp("stubs"), f"127.0.0.1:{running.server.options.addresses.grpc}")
    with made.channel:
        yield made


@pytest.mark.parametrize("call", ["predict", "stream"])
def test_grpc_answers_plain_tgis_and_openais_bodies(remote, stock, call):
    ask = getattr(remote, call)
    said = stock("Hello", 9)
    assert ask(data="Hello", max_new_tokens="9") == said
    assert ask(body=json.dumps(BODY)) == said
    texts = ask(data=json.dumps(["Hello", "you"]), max_new_tokens="9")
    assert json.loads(texts) == [said, stock("you", 9)]
    tgi = {"inputs": "Hello", "parameters": {"max_new_tokens": 9}}
    assert json.loads(ask(data=json.dumps(tgi))) == [{"generated_text": said}]
    completion = {"model": NAMES[0], "prompt": "Hello", "max_tokens": 9, "temperature": 0}
    answer = json.loads(ask(url_path="v1/completions", data=json.dumps(completion)))
    assert answer["choices"][0]["text"] == said
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, "temperature": 0}
    answer = json.loads(ask(data=json.dumps(chat)))
    assert answer["choices"][0]["message"]["content"] == stock("user: Hello\nassistant:", 9)


def test_streamed_bodies_come_whole_by_grpc(remote, stock):
    assert remote.stream(data=json.dumps({**BODY, "stream": True})) == stock("Hello", 9)
    body = {"prompt": "Hello", "max_tokens": 9, "temperature": 0, "stream": True}
    *events, done, _ = remote.stream(url_path="v1/completions", data=json.dumps(body)).split("\n\n")
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert ("".join(pieces), done) == (stock("Hello", 9), "data: [DONE]")


@pytest.mark.parametrize("call", ["predict", "stream"])
def test_a_refused_grpc_request_hears_why_and_rest_streams_go_on(running, remote, stock, call):
    pid = running.worker("tiny")["pid"]
    with running.streaming("tiny", {"prompt": "a", "max_new_tokens": 300, "stream": True}) as pieces:
        told = json.loads(getattr(remote, call)(data=json.dumps({"prompt": "a", "temperature": -1})))
        assert "temperature" in told["error"]
        assert sum(map(len, pieces)) > 100
    assert running.worker("tiny")["pid"] == pid


def test_grpc_and_rest_clients_share_a_batch(running, remote, stock):
    def ask(number: int) -> str:
        body = {"prompt": f"Story {number}", "max_new_tokens": 40}
        return remote.predict(data=json.dumps(body)) if number % 2 else running.post("tiny", json=body).text

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == [stock(f"Story {number}", 40) for number in range(12)]


def test_an_answer_too_long_for_the_one_message_is_refused(remote):
    body = {"prompt": "a", "max_tokens": 200, "n": 4, "logprobs": 5, "temperature": 0}
    told = json.loads(remote.predict(url_path="v1/completions", data=json.dumps(body)))
    assert "one message" in told["error"]["message"]


# ---- KServe's V2 by gRPC ---------------------------------------------------------------------------------------


def test_model_infer_is_answered_tensor_by_tensor(remote, stock):
    answer = remote.infer({"first": ["Hello", "日本語"], "second": ["they"]}, request_id="7")
    assert (answer.id, answer.model_name, answer.model_version) == ("7", NAMES[0], "1.0")
    assert remote.texts(answer) == {"first": [stock("Hello", 100), stock("日本語", 100)],
                                    "second": [stock("they", 100)]}  # fmt: skip


def test_model_infers_clients_share_a_batch(remote, stock):
    def ask(number: int) -> str:
        return remote.texts(remote.infer({"text": [f"Story {number}"]}))["text"][0]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == [stock(f"Story {number}", 100) for number in range(6)]


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({}, "not empty"),
        ({"numbers": [1, 2]}, "BYTES"),
        ({"raw": []}, "raw_input_contents"),
        ({"text": [b"\xff"]}, "UTF-8"),
        ({"text": ["a" * 3000]}, "2048"),
        ({"text": ["a"] * 300}, "256"),
    ],
)
def test_what_model_infer_cant_have_is_told_in_a_tensor_of_its_own(remote, tensors, told):
    answer = remote.infer(tensors, request_id="8")
    assert answer.id == "8"
    ((error,),) = remote.texts(answer).values()
    assert told in error and answer.outputs[0].name == "error"


# ---- KServe, workflows, the oldest routes ----------------------------------------------------------------------


def test_kserves_bodies_are_answered_in_kserves_form(running, stock):
    url = running.url
    asked = {"instances": ["Hello", {"data": "you"}], "parameters": {"max_new_tokens": 9}}
    answer = running.client.post(f"{url}/v1/models/tiny:predict", json=asked)
    assert answer.json() == {"predictions": [stock("Hello", 9), stock("you", 9)]}
    texts = [{"name": "first", "shape": [2], "datatype": "BYTES", "data": ["Hello", "you"]},
             {"name": "second", "shape": [1], "datatype": "BYTES", "data": ["they"]}]  # fmt: skip
    asked = {"id": "7", "inputs": texts, "parameters": {"max_new_tokens": 9}}
    answer = running.client.post(f"{url}/v2/models/tiny/infer", json=asked).json()
    assert (answer["id"], answer["model_version"]) == ("7", "1.0")
    assert [(each["name"], each["datatype"], each["data"]) for each in answer["outputs"]] == [
        ("first", "BYTES", [stock("Hello", 9), stock("you", 9)]), ("second", "BYTES", [stock("they", 9)])]  # fmt: skip


@pytest.mark.parametrize(
    ("route", "body", "told"),
    [
        ("v1/models/tiny:predict", {"instances": []}, "instances"),
        ("v1/models/tiny:predict", {"instances": [{"data": "a", "top_k": 5}]}, "parameters"),
        ("v1/models/tiny:explain", {"instances": ["a"]}, "explanations"),
        ("v2/models/tiny/infer", {"inputs": [{"name": "x", "datatype": "INT64", "data": [1]}]}, "BYTES"),
    ],
)
def test_what_kserve_cant_have_is_refused(running, route, body, told):
    answer = running.client.post(f"{running.url}/{route}", json=body)
    assert 400 <= answer.status_code < 500
    assert told in answer.json()["error"]


def test_plain_requests_and_the_oldest_routes_are_answered_beside_an_envelope(running, stock):
    said = stock("Hello", 9)
    assert running.post("tiny", json=BODY).text == said
    for route in ("invocations?model_name=tiny", "models/tiny/invoke", "tiny/predict"):
        assert running.client.post(f"{running.url}/{route}", json=BODY).text == said
    refused = running.client.post(f"{running.url}/tiny/predict", json={**BODY, "temperature": -1})
    assert refused.status_code == 422 and "temperature" in refused.json()["error"]


def test_a_workflow_is_answered_whole_and_its_worker_lives(running, stock):
    url = f"{running.management}/workflows?url=workflow.war&workflow_name=workflow"
    registered = running.client.post(url, timeout=READY_S)
    assert registered.status_code == 200, registered.text
    try:
        for number in range(3):
            body = {"prompt": f"Story {number}", "max_new_tokens": 9}
            answer = running.client.post(f"{running.url}/wfpredict/workflow", json=body)
            assert (answer.status_code, answer.text) == (200, stock(f"Story {number}", 9))
        told = running.client.post(f"{running.url}/wfpredict/workflow", json={"prompt": "a", "temperature": -1})
        assert "temperature" in told.json()["error"]
        assert running.worker("workflow__story")["status"] == "READY"
    finally:
        running.client.delete(f"{running.management}/workflows/workflow", timeout=READY_S)


# ---- bodies as curl sends them ---------------------------------------------------------------------------------


def curl(*arguments: str) -> tuple[int, str]:
    command = ["curl", "-s", "--noproxy", "*", "-w", "\n%{http_code}", *arguments]
    told, _, status = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rpartition("\n")
    return int(status), told


def test_a_text_that_torchserve_took_for_a_form_and_lost_is_told_so(running):
    status, told = curl("-d", "Once upon a time", f"{running.url}/predictions/tiny")
    assert status == 422
    assert "content-type: text/plain" in json.loads(told)["error"]


@pytest.mark.parametrize("option", ["-d", "--form-string"])
def test_a_prompt_in_a_form_is_a_text_whatever_it_looks_like(running, stock, option):
    for prompt in ("2024", "true", "[1, 2]", '"quoted"', "null"):
        status, told = curl(option, f"data={prompt}", option, "max_new_tokens=5", f"{running.url}/predictions/tiny")
        assert (status, told) == (200, stock(prompt, 5)), prompt


# ---- names and workers -----------------------------------------------------------------------------------------


def test_openais_client_lists_the_models_and_may_call_them_as_vllms_example_does(running, stock):
    with openai.OpenAI(base_url=f"{running.url}/predictions/tiny/1.0/v1", api_key="none", max_retries=0,
                       http_client=openai.DefaultHttpxClient(trust_env=False)) as client:  # fmt: skip
        assert [each.id for each in client.models.list()] == [*NAMES, "tiny"]
        for name in (*NAMES, "tiny"):
            answer = client.completions.create(model=name, prompt="Hello", max_tokens=9, temperature=0)
            assert answer.choices[0].text == stock("Hello", 9)


def test_a_second_worker_refuses_to_be_one_and_the_first_goes_on(running, stock):
    def scale(count: int) -> int:
        limits = {"min_worker": str(count), "max_worker": str(count)}
        return running.client.put(f"{running.management}/models/tiny", params=limits).status_code

    assert scale(2) == 202
    try:
        until(lambda: "replicas in section paged" in running.server.log.read_text(errors="replace"), READY_S)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: running.post("tiny", json=BODY).text, range(8)))
        assert answers == [stock("Hello", 9)] * 8
        statuses = {each["id"]: each["status"] for each in running.workers("tiny")}
        assert list(statuses.values()).count("READY") == 1
    finally:
        assert scale(1) == 202


def test_several_engines_serve_one_model_each_with_its_own_requests(running, stock):
    def ask(number: int) -> Any:
        body = {"prompt": f"Story {number}", "max_new_tokens": 30, "repetition_penalty": 1}
        return running.post("going", json=body).json()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [{"text": stock(f"Story {number}", 30)} for number in range(8)]


def test_an_archive_may_say_how_plain_requests_are_answered(running, stock):
    with running.client.stream("POST", f"{running.url}/predictions/going", json={**BODY, "stream": True,
                               "repetition_penalty": 1}) as response:  # fmt: skip
        pieces = [json.loads(line) for line in response.iter_lines()]
    assert "".join(piece["text"] for piece in pieces) == stock("Hello", 9)
    assert running.post("going", json=BODY).json() != {"text": stock("Hello", 9)}, "its default is 1.3"


def test_requests_of_a_model_without_a_worker_are_not_waited_for(running):
    def scale(name: str, count: int) -> None:
        limits = {"min_worker": str(count), "max_worker": str(count), "synchronous": "true"}
        url = f"{running.management}/models/{name}"
        assert running.client.put(url, params=limits, timeout=READY_S).status_code == 200

    body = {"prompt": "a", "max_new_tokens": 1900, "stream": True}
    with running.streaming("going", body):
        until(lambda: running.server.inquiries.num_open() == 1)
        scale("going", 0)
    assert running.metric("paged_requests_running", "going") == 1
    assert running.server.inquiries.num_open() == 0
