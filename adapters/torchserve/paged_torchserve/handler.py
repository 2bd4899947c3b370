"""The handler that TorchServe loads: by this module's name, or as a copy of this file inside an archive.

TorchServe wants exactly one class defined here. In continuous batching it calls ``handle`` once a step with all
requests it holds, and wants one reply for each, with a rule that says whether more will follow. Nothing is raised for
a single request: that would end all others.
"""

import logging
from http import HTTPStatus
from pathlib import Path
from typing import Any

from paged_serving import RequestLimits, ServedModel, quiet_imports
from paged_torchserve.bodies import FrontendRequest
from paged_torchserve.desk import Admissions, Desk
from paged_torchserve.metrics import TorchServeMetrics
from paged_torchserve.opening import open_engine
from paged_torchserve.replies import Message
from paged_torchserve.settings import read_settings
from paged_torchserve.watch import Watch

_RESPONSE_TIMEOUT_S = 120.0  # TorchServe's default
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class PagedHandler:
    """One model, for as long as its worker lives."""

    def initialize(self, context: Any) -> None:
        config = context.model_yaml_config or {}
        settings = read_settings(config)
        if not config.get("continuousBatching"):
            raise ValueError("model-config.yaml must say continuousBatching: true; paged torchserve swap writes it")
        quiet_imports()
        place = context.system_properties
        metrics, admissions = TorchServeMetrics(context.model_name, context.metrics), Admissions()
        plugins = [metrics.observer, admissions]
        self._engine = open_engine(Path(place["model_dir"]), place.get("gpu_id"), settings, plugins)
        limits = RequestLimits(max_grammar_ms=settings.max_grammar_ms)
        served = ServedModel(self._engine, [context.model_name], limits)
        self._desk = Desk(self._engine, served, settings, admissions)
        max_step_s = float(config.get("responseTimeout") or _RESPONSE_TIMEOUT_S)
        self._watch = Watch(self._engine, self._desk, metrics.flush, settings.heartbeat_s, max_step_s)
        logging.getLogger("paged_torchserve").info("%s is ready", context.model_name)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """One step: the requests TorchServe holds in, news for each of them out."""
        requests = [
            FrontendRequest(context.get_request_id(index), parts, context.get_all_request_header(index))
            for index, parts in enumerate(data)
        ]
        messages = self._desk.step(requests)
        for index, message in enumerate(messages):
            _set_head(context, index, message)
        context.stopping_criteria = [lambda reply, end=message.end: end for message in messages]
        return [message.body for message in messages]

    def close(self) -> None:
        """Free everything. TorchServe never calls it: it ends the process."""
        self._watch.close()
        self._desk.close()
        self._engine.close()


def _set_head(context: Any, index: int, message: Message) -> None:
    context.set_response_status(message.status, _PHRASES.get(message.status, ""), index)
    context.set_response_content_type(index, message.content_type)
