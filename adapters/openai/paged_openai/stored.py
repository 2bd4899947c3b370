"""Responses that were answered before: asked for again, with what they were asked, and deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paged_openai.responses import OPENAI, error_response, large_json_bytes
from paged_serving import ProtocolError, ResponseStore, items_page

_PATH = "/v1/responses/{response_id}"


class StoredResponses:
    """What ``store`` keeps, by its ids."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    @property
    def routes(self) -> list[Route]:
        return [
            Route(_PATH, self.get, methods=["GET"]),
            Route(_PATH, self.delete, methods=["DELETE"]),
            Route(f"{_PATH}/input_items", self.input_items, methods=["GET"]),
        ]

    async def get(self, request: Request) -> Response:
        """The response as it was answered."""
        return await _told(self._get, request)

    async def input_items(self, request: Request) -> Response:
        """What it was asked, that of the responses before included."""
        return await _told(self._input_items, request)

    async def delete(self, request: Request) -> Response:
        """It is forgotten: nothing can be asked of it or go on from it."""
        return await _told(self._delete, request)

    def _get(self, response_id: str, request: Request) -> Any:
        if request.query_params.get("stream") in ("true", "1"):
            raise ProtocolError("stream can't be honoured: a response that is kept has ended", "stream")
        return self._store.response(response_id)

    def _input_items(self, response_id: str, request: Request) -> Any:
        return items_page(self._store.asked(response_id), response_id, request.query_params)

    def _delete(self, response_id: str, request: Request) -> Any:
        self._store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}


async def _told(look: Callable[[str, Request], Any], request: Request) -> Response:
    """In a thread: a response may be as large as the body that asked for it."""
    try:
        body = await run_in_threadpool(
            lambda: large_json_bytes(look(request.path_params["response_id"], request)),
        )
    except ProtocolError as error:
        return error_response(OPENAI, error)
    return Response(body, media_type="application/json")
