"""The page for browsers: one file of HTML without external parts, and its data. Knows no protocol. The page itself
needs no key and holds no data; it asks its user for a key and requests all data with it.
"""

from __future__ import annotations

import asyncio
import re
import time
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from paged_core import Engine, EngineBusyError, EngineDeadError, EngineView
from paged_openai.responses import TGI, error_response
from paged_openai.service import Service
from paged_serving import CallError, Failure, PrometheusMetrics, json_bytes

MAX_CELLS = 2048  # of the block map, however many blocks there are
_PATIENCE_S = 10.0  # for an engine whose step doesn't end
_FRESH_S = 0.25  # how long one view of the engine serves all pages


class Page:
    """The endpoints of ``GET /`` and ``GET /live``."""

    def __init__(self, service: Service, metrics: PrometheusMetrics | None) -> None:
        self._engine, self._metrics = service.engine, metrics
        self._model = service.served.names[0]
        html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        self._html = html.encode()
        self._headers = {"content-security-policy": security_policy(html), "x-content-type-options": "nosniff",
                         "referrer-policy": "no-referrer", "cache-control": "no-cache",
                         "vary": "accept"}  # fmt: skip
        self._looking: asyncio.Future[bytes] | None = None
        self._looked_at = 0.0

    async def page(self, request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            raise HTTPException(405, headers={"Allow": "POST"})
        return Response(self._html, headers=self._headers, media_type="text/html")

    async def live(self, request: Request) -> Response:
        """What runs, what waits, and the block map."""
        now = time.monotonic()
        if self._looking is None or (self._looking.done() and now - self._looked_at > _FRESH_S):
            self._looking, self._looked_at = asyncio.ensure_future(self._look()), now
        try:
            body = await asyncio.wait_for(asyncio.shield(self._looking), _PATIENCE_S)
        except (EngineBusyError, EngineDeadError) as error:
            return error_response(TGI, CallError(Failure.UNAVAILABLE, str(error)))
        except asyncio.TimeoutError:
            return error_response(TGI, CallError(Failure.UNAVAILABLE, "the engine is busy with a long step"))
        return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")

    async def _look(self) -> bytes:
        view = await asyncio.wrap_future(self._engine.look(Engine.view))
        return await run_in_threadpool(self._told, view)

    def _told(self, view: EngineView) -> bytes:
        cells = view.cells(MAX_CELLS)
        blocks: dict[str, Any] = {"num": cells.num_blocks, "per_cell": cells.blocks_per_cell, "cached": cells.cached,
                                  "used": cells.used, "shared": cells.shared}  # fmt: skip
        return json_bytes({
            "model": self._model,
            "running": view.num_running,
            "waiting": view.num_waiting,
            "max_running": self._engine.engine.sizes.max_num_seqs,
            "generated": None if self._metrics is None else self._metrics.num_generated,
            "block_size": view.block_size,
            "saved": view.num_saved,
            "blocks": blocks,
            "tiers": [{"name": tier.name, "blocks": tier.num_blocks} for tier in view.offloading.tiers],
            "loaded": view.offloading.total_tokens_loaded,
        })  # fmt: skip


def security_policy(html: str) -> str:
    """Only the page's own script and style run, it calls only its own server, and nobody frames it."""
    allowed = {tag: " ".join(_hashes(tag, html)) for tag in ("script", "style")}
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(tag: str, html: str) -> list[str]:
    return [
        f"'sha256-{b64encode(sha256(inside.encode()).digest()).decode()}'"
        for inside in re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    ]
