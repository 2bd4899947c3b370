"""OpenTelemetry spans: one a call, without texts, and nothing imported where nobody asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from http_server import alphabet_server
from paged_openai.app import AppOptions
from paged_openai.tracing import Traces, open_traces

BODY = {"prompt": "ABC", "max_tokens": 4, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_a_span_with_its_counts_in_the_clients_trace(stream: bool) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    options = AppOptions(traces=Traces(provider, "alphabet"))
    trace = "0af7651916cd43dd8448eb211c80319c"
    with alphabet_server(options=options) as server, server.client() as client:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        client.post("/v1/completions", json={**BODY, "stream": stream}, headers=headers).raise_for_status()
        assert client.post("/v1/completions", json={**BODY, "n": 500, "temperature": 1}).status_code == 400
        server.come_to_rest()
    refused = exporter.get_finished_spans()[1]
    assert refused.status.status_code is StatusCode.ERROR
    assert refused.attributes is not None
    assert (refused.attributes["error.type"], refused.attributes["paged_core.refused_field"]) == ("ProtocolError", "n")
    span = exporter.get_finished_spans()[0]
    assert span.name == "text_completion alphabet"
    assert span.attributes is not None
    told = {name.removeprefix("gen_ai."): value for name, value in span.attributes.items()}
    assert (told["usage.input_tokens"], told["usage.output_tokens"]) == (3, 4)
    assert told["request.stream"] is stream and told["request.max_tokens"] == 4
    assert told["response.finish_reasons"] == ("length",)
    assert 0 < told["response.time_to_first_chunk"] < 30
    assert f"{span.context.trace_id:032x}" == trace
    assert span.status.status_code is StatusCode.UNSET
    assert "ABC" not in str(span.attributes)
    assert span.start_time < span.end_time


def test_seeds_that_the_export_cannot_hold_are_left_out() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    seeds = (2**63 - 1, 2**63, 2**64 - 1)
    with alphabet_server(options=AppOptions(traces=Traces(provider, "alphabet"))) as server, server.client() as client:
        for seed in seeds:
            client.post("/v1/completions", json={**BODY, "seed": seed}).raise_for_status()
        server.come_to_rest()
    spans = exporter.get_finished_spans()
    assert [(span.attributes or {}).get("gen_ai.request.seed") for span in spans] == [2**63 - 1, None, None]
    encode_spans(spans)  # as they are sent


def test_without_an_endpoint_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert open_traces("alphabet") is None
    code = "import sys, paged_openai.serving as s; s.open_traces('a'); assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_with_an_endpoint_spans_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    traces = open_traces("alphabet")
    assert traces is not None
    traces.close()


def test_without_the_package_it_is_said_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with caplog.at_level("WARNING", "paged_openai"):
        assert open_traces("alphabet") is None
    assert "paged-core[otel]" in caplog.text
