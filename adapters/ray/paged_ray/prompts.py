"""Prompts: digests of the beginning of a request's prompt, as replicas compute them of their blocks. Reads bodies; runs
nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from paged_core import AsyncEngine
from paged_ray.digests import chain
from paged_ray.messages import EngineFacts
from paged_ray.pieces import PieceCodec
from paged_ray.settings import Settings
from paged_serving import Call, ChatCall, CompletionCall, ServedModel, TGICall, parse_json

_MAKES: dict[str, Callable[[Any, ServedModel, str], Call]] = {
    "/v1/completions": CompletionCall,
    "/v1/chat/completions": ChatCall,
    "/generate": lambda body, served, _: TGICall(body, served, False),
    "/generate_stream": lambda body, served, _: TGICall(body, served, True),
    "/": lambda body, served, _: TGICall(body, served, None),
}


class Prompts:
    """The text side of a remote engine. For several threads."""

    def __init__(self, facts: EngineFacts, settings: Settings) -> None:
        self._codec = PieceCodec(facts.tokenizer)
        engine = SimpleNamespace(
            engine=SimpleNamespace(spec=facts.spec), codec=self._codec, sizes=facts.sizes, config=facts.config
        )
        self._served = ServedModel(
            cast(AsyncEngine, engine), settings.served_names, settings.limits, strict_fields=settings.strict_fields
        )
        self._key = settings.key
        self.block_size: int = facts.sizes.block_size

    def knows(self, path: str) -> bool:
        """Whether prompts of this path's requests can be read."""
        return path in _MAKES

    def digests(self, path: str, body: bytes) -> tuple[list[int], int]:
        """(digests of its first prompt's leading blocks, tokens of all its prompts, about); empty for an invalid body,
        which the replica will refuse."""
        self._codec.take_unread()
        try:
            call = _MAKES[path](parse_json(body), self._served, "routed")
            salt = call.params.cache_salt
            first = call.prompts[0].token_ids
            num_tokens = sum(len(each.token_ids) for each in call.prompts) + self._codec.take_unread()
            return chain(self._key, first, salt, self.block_size), num_tokens
        except Exception:
            return [], 0
