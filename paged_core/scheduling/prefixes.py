"""Prefixes: which leading blocks of a request need not be computed, since another one has computed them, or does.

This file knows requests and the pool's index of blocks by content, and decides nothing about who runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from paged_core.scheduling.block_pool import NULL_BLOCK, BlockPool
from paged_core.scheduling.request import Request, RequestStatus
from paged_core.scheduling.schedule import Limits


class Prefixes:
    """The prefix cache as requests see it. A block is published once the step that computed it has completed, and
    has computed numbers."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.num_queries = 0  # prompt tokens looked up in the prefix index
        self.num_hits = 0  # and found there
        self._pool = pool
        self._enabled = limits.enable_prefix_caching
        self._window = limits.sliding_window
        self._in_flight: dict[bytes, Request] = {}  # blocks being computed: who shares them waits for them

    def digest(self, request: Request, num_tokens: int) -> None:
        """Name the full blocks of its first ``num_tokens`` by their content."""
        if self._enabled and len(request.digests) < num_tokens // self._pool.block_size:
            self._pool.extend_digests(request.digests, request.tokens[:num_tokens], request.params.cache_salt)

    def lookup(self, request: Request) -> list[int]:
        """Leading blocks of a waiting request that are there already."""
        if not self._enabled or request.wants_prompt_logprobs:
            return []
        size = self._pool.block_size
        hits = self._pool.match(request.digests[: self._most(request)], request.tokens)
        if self._window is not None:  # what lies behind the window already is not taken
            behind = max(0, (len(hits) * size + 1 - self._window) // size)
            hits[:behind] = [NULL_BLOCK] * behind
        return hits

    def comes_soon(self, request: Request, num_hits: int) -> bool:
        """Whether the first block that the request lacks is being computed for another one right now."""
        if num_hits >= min(self._most(request), len(request.digests)) or request.wants_prompt_logprobs:
            return False
        return request.digests[num_hits] in self._in_flight

    def take(self, request: Request, hit: Sequence[int]) -> None:
        """The request starts from the blocks that ``lookup`` has found, and will compute the others."""
        self._pool.share(hit)
        request.block_table.replace(self._pool, hit)
        request.num_computed = len(hit) * self._pool.block_size
        request.num_published = len(hit)
        if not request.num_recomputed_to:
            request.num_cached = request.num_computed
        self.num_queries += len(request.tokens)
        self.num_hits += request.num_computed
        for digest in request.digests[len(hit) :]:
            self._in_flight.setdefault(digest, request)

    def publish(self, request: Request) -> None:
        """Let others find the blocks that the request has filled."""
        if not self._enabled:
            return
        size = self._pool.block_size
        full = request.num_computed // size
        self.digest(request, full * size)
        for i in range(request.num_published, full):
            self._pool.publish(request.block_table[i], request.digests[i], request.tokens[i * size : (i + 1) * size])
            self._landed(request, request.digests[i])
        request.num_published = full

    def distrust(self, request: Request) -> None:
        """What was computed for it is no numbers: nobody may find its blocks, whoever filled them, nor later ones."""
        self.abandon(request)
        self._pool.forget(request.block_table)
        request.num_published = sys.maxsize

    def abandon(self, request: Request) -> None:
        """It won't fill the blocks that others wait for."""
        for digest in request.digests[request.num_published :]:
            self._landed(request, digest)

    def forget_all(self, running: Iterable[Request]) -> None:
        """K/V computed until now are another model's: nobody else may find them, whoever goes on with them."""
        self._pool.forget_all()
        self._in_flight.clear()
        for request in running:
            request.num_published = sys.maxsize  # the blocks it has, and fills, are mixed

    def check(self) -> None:
        assert all(owner.status is RequestStatus.RUNNING for owner in self._in_flight.values())

    def _most(self, request: Request) -> int:
        return (len(request.tokens) - 1) // self._pool.block_size  # the last token is always computed

    def _landed(self, request: Request, digest: bytes) -> None:
        if self._in_flight.get(digest) is request:
            del self._in_flight[digest]
