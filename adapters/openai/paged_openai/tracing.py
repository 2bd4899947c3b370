"""OpenTelemetry: a span for each call, if somebody is to get them. Nothing of it is imported otherwise.

Attributes are those of OpenTelemetry's semantic conventions for generative AI. No prompts and no answers.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from paged_core import GenerationOutput, InvalidRequestError
from paged_serving import Call

_log = logging.getLogger("paged_openai")
_LARGEST = 2**63 - 1  # that the export's integers can hold; seeds may be larger, and are left out then
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Traces:
    """``provider``: OpenTelemetry's TracerProvider."""

    def __init__(self, provider: Any, model: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("paged_openai")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def record(
        self, call: Call | None, path: str, headers: Mapping[str, str], results: Sequence[GenerationOutput],
        error: Exception | None, duration_s: float,
    ) -> None:  # fmt: skip
        """A call that has ended now; None: its body was refused. ``traceparent`` among its headers makes the span a
        part of the client's trace."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        operation = "chat" if path.endswith("/chat/completions") else "text_completion"
        ended = time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=ended - int(duration_s * 1e9),
            attributes={"gen_ai.operation.name": operation, **_attributes(call, self._model, results)},
        )
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            if isinstance(error, InvalidRequestError) and error.param is not None:
                span.set_attribute("paged_core.refused_field", error.param)
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_time=ended)

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()


def open_traces(model: str) -> Traces | None:
    """Traces to the endpoint that the environment names; None if it names none, or OpenTelemetry isn't installed."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        _log.warning("no traces: %s; pip install 'paged-core[otel]'", error)
        return None
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider, model)


def _attributes(call: Call | None, model: str, results: Sequence[GenerationOutput]) -> dict[str, Any]:
    attributes: dict[str, Any] = {"gen_ai.provider.name": "paged_core", "gen_ai.request.model": model}
    if call is not None:
        params = call.params
        attributes |= {
            "gen_ai.response.model": model,
            "gen_ai.request.stream": call.stream,
            "gen_ai.request.choice.count": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.seed": params.seed if (params.seed or 0) <= _LARGEST else None,
        }
    if results:
        outputs = [output for result in results for output in result.outputs]
        firsts = [result.metrics.time_to_first_token_s for result in results if result.metrics is not None]
        attributes |= {
            "gen_ai.usage.input_tokens": sum(len(result.prompt_token_ids) for result in results),
            "gen_ai.usage.output_tokens": sum(len(output.token_ids) for output in outputs),
            "gen_ai.response.finish_reasons": [output.finish_reason for output in outputs],
            "gen_ai.response.time_to_first_chunk": min((first for first in firsts if first is not None), default=None),
        }
    return {name: value for name, value in attributes.items() if value is not None}
