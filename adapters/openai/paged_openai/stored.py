"""Responses that were answered before: asked for again, and deleted."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paged_openai.responses import OPENAI, error_response, json_response
from paged_serving import ProtocolError, ResponseStore

_PATH = "/v1/responses/{response_id}"


class StoredResponses:
    """What ``store`` keeps, by its ids."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    @property
    def routes(self) -> list[Route]:
        return [Route(_PATH, self.get, methods=["GET"]), Route(_PATH, self.delete, methods=["DELETE"])]

    async def get(self, request: Request) -> Response:
        """The response as it was answered."""
        try:
            if request.query_params.get("stream") in ("true", "1"):
                raise ProtocolError("stream can't be honoured: a response that is kept has ended", "stream")
            return json_response(self._store.response(request.path_params["response_id"]))
        except ProtocolError as error:
            return error_response(OPENAI, error)

    async def delete(self, request: Request) -> Response:
        """It is forgotten: nothing can be asked of it or go on from it."""
        response_id = request.path_params["response_id"]
        try:
            self._store.delete(response_id)
        except ProtocolError as error:
            return error_response(OPENAI, error)
        return json_response({"id": response_id, "object": "response", "deleted": True})
