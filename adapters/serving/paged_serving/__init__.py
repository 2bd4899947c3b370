"""What every server needs: protocols, grammars, exchanges with the engine, health, metrics."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_serving.exchange import Exchange, Listener, compile_grammar
    from paged_serving.health import trouble
    from paged_serving.http_metrics import HTTPMetrics
    from paged_serving.kv_events import KVEvents
    from paged_serving.messages import LAST_EVENT, as_event, event_bytes, json_bytes, json_text
    from paged_serving.metrics import PrometheusMetrics
    from paged_serving.options import add_engine_options, add_load_options, engine_config, whole_number
    from paged_serving.outcomes import as_outcome
    from paged_serving.protocol.anthropic import MessagesCall, count_tokens
    from paged_serving.protocol.anthropic_body import CountBody, MessagesBody
    from paged_serving.protocol.bodies import Body
    from paged_serving.protocol.call import Call
    from paged_serving.protocol.chat import ChatCall
    from paged_serving.protocol.chat_body import ChatBody
    from paged_serving.protocol.completions import CompletionBody, CompletionCall
    from paged_serving.protocol.detokenize import DetokenizeBody, detokenize
    from paged_serving.protocol.document import body_schema
    from paged_serving.protocol.failures import CallError, Failure, anthropic_error, openai_error, tgi_error
    from paged_serving.protocol.parsing import ProtocolError, parse_json
    from paged_serving.protocol.reading import unknown_fields
    from paged_serving.protocol.response_items import items_page
    from paged_serving.protocol.response_store import ResponseStore
    from paged_serving.protocol.responses import ResponsesCall
    from paged_serving.protocol.responses_body import ResponsesBody
    from paged_serving.protocol.served import RequestLimits, ServedModel
    from paged_serving.protocol.tgi import TGICall
    from paged_serving.protocol.tgi_body import TGIBody
    from paged_serving.protocol.tokenize import TokenizeBody, tokenize
    from paged_serving.quiet import no_progress_bars, quiet_imports
    from paged_serving.response_templates.template import ResponseTemplate

# Imported when first used, so that finding plugins does not load torch.
_LAZY = {
    "Body": "protocol.bodies",
    "Call": "protocol.call",
    "CallError": "protocol.failures",
    "ChatBody": "protocol.chat_body",
    "ChatCall": "protocol.chat",
    "CompletionBody": "protocol.completions",
    "CompletionCall": "protocol.completions",
    "CountBody": "protocol.anthropic_body",
    "DetokenizeBody": "protocol.detokenize",
    "Exchange": "exchange",
    "Listener": "exchange",
    "Failure": "protocol.failures",
    "HTTPMetrics": "http_metrics",
    "KVEvents": "kv_events",
    "LAST_EVENT": "messages",
    "MessagesBody": "protocol.anthropic_body",
    "MessagesCall": "protocol.anthropic",
    "PrometheusMetrics": "metrics",
    "ProtocolError": "protocol.parsing",
    "RequestLimits": "protocol.served",
    "ResponseStore": "protocol.response_store",
    "ResponseTemplate": "response_templates.template",
    "ResponsesBody": "protocol.responses_body",
    "ResponsesCall": "protocol.responses",
    "ServedModel": "protocol.served",
    "TGIBody": "protocol.tgi_body",
    "TGICall": "protocol.tgi",
    "TokenizeBody": "protocol.tokenize",
    "add_engine_options": "options",
    "add_load_options": "options",
    "anthropic_error": "protocol.failures",
    "as_event": "messages",
    "as_outcome": "outcomes",
    "body_schema": "protocol.document",
    "compile_grammar": "exchange",
    "count_tokens": "protocol.anthropic",
    "detokenize": "protocol.detokenize",
    "engine_config": "options",
    "event_bytes": "messages",
    "items_page": "protocol.response_items",
    "json_bytes": "messages",
    "json_text": "messages",
    "no_progress_bars": "quiet",
    "openai_error": "protocol.failures",
    "parse_json": "protocol.parsing",
    "quiet_imports": "quiet",
    "tgi_error": "protocol.failures",
    "tokenize": "protocol.tokenize",
    "trouble": "health",
    "unknown_fields": "protocol.reading",
    "whole_number": "options",
}

__all__ = [
    "LAST_EVENT",
    "Body",
    "Call",
    "CallError",
    "ChatBody",
    "ChatCall",
    "CompletionBody",
    "CompletionCall",
    "CountBody",
    "DetokenizeBody",
    "Exchange",
    "Failure",
    "HTTPMetrics",
    "KVEvents",
    "Listener",
    "MessagesBody",
    "MessagesCall",
    "PrometheusMetrics",
    "ProtocolError",
    "RequestLimits",
    "ResponseStore",
    "ResponseTemplate",
    "ResponsesBody",
    "ResponsesCall",
    "ServedModel",
    "TGIBody",
    "TGICall",
    "TokenizeBody",
    "add_engine_options",
    "add_load_options",
    "anthropic_error",
    "as_event",
    "as_outcome",
    "body_schema",
    "compile_grammar",
    "count_tokens",
    "detokenize",
    "engine_config",
    "event_bytes",
    "items_page",
    "json_bytes",
    "json_text",
    "no_progress_bars",
    "openai_error",
    "parse_json",
    "quiet_imports",
    "tgi_error",
    "tokenize",
    "trouble",
    "unknown_fields",
    "whole_number",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'paged_serving' has no attribute {name!r}")
    return getattr(import_module(f"paged_serving.{_LAZY[name]}"), name)
