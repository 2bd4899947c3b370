"""A server's options, its log, and TLS."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import ssl
import subprocess
import sys
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from alphabet_model import AlphabetModel
from http_server import alphabet_server, request_lines
from paged_core import ConfigError, Engine
from paged_openai.app import AppOptions
from paged_openai.commands import add_options, main, request_limits, serve
from paged_openai.responses import _json_pieces, large_json_bytes
from paged_openai.serving import short_collections
from paged_serving import RequestLimits, engine_config, json_bytes
from places import TESTS


def test_each_request_is_one_line_without_its_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paged_openai")
    with alphabet_server() as server, server.client() as client:
        ours = client.post("/v1/completions", json={"prompt": "SECRET", "max_tokens": 3}).headers["x-request-id"]
        theirs = client.post("/generate", json={"inputs": "SECRET", "stream": 7}, headers={"X-Request-Id": "mine-7"})
        evil = client.post("/generate", json={}, headers={"X-Request-Id": "a b"}).headers["x-request-id"]
        list_ = client.post("/generate", json={"inputs": ["SECRET"]}).headers["x-request-id"]
        client.get("/health")
        lines = request_lines(caplog, 4)
    assert theirs.headers["x-request-id"] == "mine-7"
    assert " " not in evil
    told = {line["request_id"]: (line["status"], line.get("error")) for line in lines}
    assert len(lines) == 4
    assert told == {
        ours: (200, None),
        "mine-7": (422, "refused: stream"),
        evil: (422, "refused: inputs"),
        list_: (422, "refused: inputs"),
    }
    first = next(line for line in lines if line["request_id"] == ours)
    assert (first["path"], first["prompt_tokens"], first["output_tokens"]) == ("/v1/completions", 6, 3)
    assert first["finish_reasons"] == ["length"]
    assert first["duration_ms"] > 0
    assert "SECRET" not in json.dumps(lines)


def test_prompts_are_logged_if_the_operator_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paged_openai")
    with alphabet_server(options=AppOptions(log_prompts=True)) as server, server.client() as client:
        client.post("/v1/completions", json={"prompt": "KNOWN"})
        (line,) = request_lines(caplog, 1)
    assert "KNOWN" in json.dumps(line)


def test_options_become_configuration() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    said = ["--max-num-seqs", "7", "--kv-bytes", "1000000", "--no-prefix-caching", "--max-n", "3"]
    args = parser.parse_args(said)
    config = engine_config(args)
    assert (config.max_num_seqs, config.kv_cache_bytes, config.enable_prefix_caching) == (7, 1_000_000, False)
    assert request_limits(args) == RequestLimits(max_n=3)
    for wrong in (["--max-n", "0"], ["--body-timeout", "-1"], ["--max-queue", "-1"], ["--request-timeout", "nan"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


def test_a_server_takes_most_of_its_gpu_and_a_size_that_was_said_goes_before_that() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    config = engine_config(parser.parse_args([]))
    assert (config.gpu_memory_utilization, config.cuda_graphs) == (0.9, None)
    said = ["--gpu-memory-utilization", "0.5", "--no-cuda-graphs", "--kv-bytes", "1000000"]
    config = engine_config(parser.parse_args(said))
    assert (config.gpu_memory_utilization, config.cuda_graphs) == (0.5, False)
    # on a CPU the share means nothing
    config = replace(config, attention_backend="reference")
    shares = [replace(config, gpu_memory_utilization=share) for share in (0.5, None)]
    assert len({Engine(AlphabetModel(), share).sizes.num_blocks for share in shares}) == 1
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        engine_config(parser.parse_args(["--gpu-memory-utilization", "90"]))


def test_large_answers_are_the_same_json_in_small_pieces() -> None:
    values: list[Any] = [
        {}, [], [[]], {"a": {}}, [{}], "ä\n\"", [1.5, "a", None], {"a": 1, "b": [1, {"c": [True]}]}, {"d": {3: {}}},
        list(range(1000)), [{"n": i, "of": [i] * 300} for i in range(300)], {"all": [{"p": [None, *[{7: 1}] * 600]}]},
    ]  # fmt: skip
    for value in values:
        assert json.loads(large_json_bytes(value)) == json.loads(json.dumps(value))
    assert large_json_bytes(values[8]) == json_bytes(values[8])
    assert max(map(len, _json_pieces([["x" * 10] * 100] * 10_000))) < 3000


def test_tls_is_spoken_with_a_certificate() -> None:
    pem = TESTS / "adapters" / "loopback.pem"
    with alphabet_server(ssl_certfile=pem) as server:
        trusting = ssl.create_default_context(cafile=pem)
        with httpx2.Client(base_url=f"https://127.0.0.1:{server.port}", verify=trusting, trust_env=False) as client:
            assert client.post("/generate", json={"inputs": "A"}).status_code == 200
        with pytest.raises(httpx2.TransportError), server.client() as client:
            client.get("/health")


def test_without_its_packages_a_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("serving", "server"):  # others may have imported them
        monkeypatch.delattr(f"paged_openai.{name}", raising=False)
    monkeypatch.delitem(sys.modules, "paged_openai.serving", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "paged_openai.server")
    arguments = argparse.ArgumentParser()
    add_options(arguments)
    with pytest.raises(ConfigError, match=r"paged-core\[server\]"):
        serve(arguments.parse_args([]))


def test_tls_needs_a_certificate(tmp_path: Any) -> None:
    assert main(["--model", "x", "--ssl-keyfile", str(tmp_path / "key")]) == 2
    assert main(["--model", "x", "--ssl-certfile", str(tmp_path / "cert")]) == 2
    assert main(["--model", "x", "--api-key", ""]) == 2


def test_the_program_of_its_own_settles_its_threads_as_paged_serve_does() -> None:
    program = """
import os
from paged_openai.commands import main
try:
    main(["--help"])
finally:
    print(os.environ["GOMP_SPINCOUNT"])
"""
    ours = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    told = subprocess.run([sys.executable, "-c", program], env=ours, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "300"


def test_while_serving_the_collector_does_not_look_at_what_the_start_has_made() -> None:
    made = [[number] for number in range(1000)]
    with short_collections():
        young = [[number] for number in range(1000)]
        looked_at = {id(each) for each in gc.get_objects()}
        assert not looked_at & {id(each) for each in made}
        assert looked_at >= {id(each) for each in young}
    assert {id(each) for each in gc.get_objects()} >= {id(each) for each in made}
