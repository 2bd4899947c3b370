"""The handler that TorchServe loads: by this module's name, or as a copy of this file inside an archive.

TorchServe wants exactly one class defined here. In continuous batching it calls ``handle`` once a step with all
requests it holds, and expects one reply for each, and whether more will follow. Nothing is raised for
a single request: that would end all others.
"""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from paged_core import AsyncEngine
from paged_serving import PrometheusMetrics, RequestLimits, ServedModel, quiet_imports
from paged_torchserve.desk import Desk
from paged_torchserve.devices import choose_devices
from paged_torchserve.envelopes import have_bodies_decoded, pass_envelopes_by
from paged_torchserve.lanes import Admissions, Lane, LaneObservers
from paged_torchserve.metrics import TorchServeMetrics
from paged_torchserve.opening import open_engines
from paged_torchserve.replies import ReplyMessage
from paged_torchserve.requests import FrontendRequest
from paged_torchserve.settings import SectionSettings, read_settings
from paged_torchserve.target import Target
from paged_torchserve.watch import Watch
from paged_torchserve.worker_log import announce_compiling
from paged_torchserve.workers import OnlyWorker

_RESPONSE_TIMEOUT_S = 120.0  # TorchServe's default
_log = logging.getLogger("paged_torchserve")
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class PagedHandler:
    """One model, for as long as its worker lives."""

    def initialize(self, context: Any) -> None:
        config = context.model_yaml_config or {}
        settings = read_settings(config)
        if not config.get("continuousBatching"):
            raise ValueError("model-config.yaml must say continuousBatching: true; paged torchserve swap writes it")
        place = context.system_properties
        self._worker = OnlyWorker(Path(place["model_dir"]))
        quiet_imports()
        announce_compiling(_log)
        pass_envelopes_by()
        have_bodies_decoded()
        devices = choose_devices(place.get("gpu_id"), _gpu_ids(config), settings)
        observers = [LaneObservers(Admissions(), PrometheusMetrics(context.model_name)) for _ in devices]
        plugins = [each.plugins for each in observers]
        self._engines = open_engines(Path(place["model_dir"]), devices, settings, plugins)
        targets = [_target(engine, context, settings) for engine in self._engines]
        self._desk = Desk([Lane(*each) for each in zip(self._engines, targets, observers, strict=True)],
            settings.max_reply_bytes)  # fmt: skip
        metrics = TorchServeMetrics(context.model_name, context.metrics, [each.metrics for each in observers])
        max_step_s = float(config.get("responseTimeout") or _RESPONSE_TIMEOUT_S)
        self._watch = Watch(self._engines, self._desk, metrics.flush, settings.heartbeat_s, max_step_s)
        _log.info("%s is ready", context.model_name)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """One step: the requests that TorchServe holds in, a message for each of them out."""
        inherits = self._worker.may_inherit
        requests = [
            FrontendRequest(context.get_request_id(index), parts, context.get_all_request_header(index), inherits)
            for index, parts in enumerate(data)
        ]
        messages = self._desk.step(requests)
        for index, message in enumerate(messages):
            if message is None:
                del context.request_ids[index]  # a request that is not named in an answer keeps waiting
            else:
                _set_head(context, index, message)
        context.stopping_criteria = [lambda reply, end=message and message.end: end for message in messages]
        return [b"" if message is None else message.body for message in messages]

    def close(self) -> None:
        """Free everything. TorchServe never calls it: it ends the process."""
        self._watch.close()
        self._desk.close()
        for engine in self._engines:
            engine.close()
        self._worker.close()


def _target(engine: AsyncEngine, context: Any, settings: SectionSettings) -> Target:
    names = [*settings.served_model_names, context.model_name]
    version = ((context.manifest or {}).get("model") or {}).get("modelVersion", "")
    limits = RequestLimits(max_grammar_ms=settings.max_grammar_ms)
    served = ServedModel(engine, names, limits)
    served.prepare_grammars()
    return Target(served, settings, str(version))


def _gpu_ids(config: Mapping[str, Any]) -> Sequence[int]:
    """Of the GPUs that this model's workers may be given."""
    import torch

    return config.get("deviceIds") or range(torch.cuda.device_count())


def _set_head(context: Any, index: int, message: ReplyMessage) -> None:
    context.set_response_status(message.status, _PHRASES.get(message.status, ""), index)
    context.set_response_content_type(index, message.content_type)
