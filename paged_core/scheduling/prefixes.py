"""Prefixes: leading blocks of a request that another request has computed or is computing, so that it need not.

This file knows requests, the pool's index of blocks by content, and which blocks a tier holds. It does not decide which
requests run.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

from paged_core.scheduling.block_pool import NULL_BLOCK, BlockContent, BlockPool
from paged_core.scheduling.request import Request, RequestStatus
from paged_core.scheduling.schedule import Limits

Found = list[int | None]
"""Leading blocks of a request, in order: ids of those in the cache, and None for each that a tier would load."""


class Stored(Protocol):
    """What a tier holds, as far as scheduling needs to know. Every method returns at once."""

    @property
    def wants_more(self) -> bool:
        """Whether to store blocks that the cache evicts, though no request may ask for them again."""
        ...

    @property
    def wants_back(self) -> bool:
        """Whether to store blocks that a preempted request will ask for again."""
        ...

    def holds(self, digest: bytes) -> bool: ...

    def pays(self, num_blocks: int, num_tokens: int, beside: bool) -> bool:
        """Return whether loading so many blocks is faster than computing so many tokens. ``beside``: doing both, from
        either end, counts as loading."""
        ...

    def pays_beside(self, num_blocks: int, num_tokens: int) -> bool:
        """Return whether loading blocks from the last one on, while the first tokens are computed, is faster than
        loading all."""
        ...

    def num_to_compute(self, num_blocks: int, num_tokens: int) -> int:
        """Return how many of the tokens to compute until they meet the blocks that the tier loads from the other
        end."""
        ...


class Prefixes:
    """The prefix cache as requests see it. A block is published after the step that computed it, if its logits were
    finite."""

    def __init__(self, pool: BlockPool, limits: Limits, stored: Stored | None = None) -> None:
        self.num_queries = 0  # prompt tokens looked up in the prefix index
        self.num_hits = 0  # and found there
        self.num_asked = 0  # tokens not found there, and looked up in a tier
        self.num_loaded = 0  # tokens whose K/V a tier loaded, so that no request computed them
        self._pool = pool
        self._enabled = limits.enable_prefix_caching
        self._window = limits.sliding_window
        self._stored = stored
        self._preempted: list[Request] = []  # requests that may still wait for their turn
        self._in_flight: dict[bytes, Request] = {}  # digest -> who computes or loads that block now

    def digest(self, request: Request, num_tokens: int) -> None:
        """Compute the digests of the full blocks of its first ``num_tokens`` tokens."""
        num_full, tokens = num_tokens // self._pool.block_size, request.tokens
        if self._enabled and len(request.digests) < num_full:
            if len(tokens) // self._pool.block_size > num_full:
                tokens = tokens[:num_tokens]
            self._pool.extend_digests(request.digests, tokens, request.params.cache_salt)

    def lookup(self, request: Request, *, beside: bool) -> Found:
        """Return the leading blocks of a waiting request that are in the cache, and those that are faster to load than
        to compute. ``beside``: the request may compute some blocks while others are loaded."""
        if not self._enabled or request.wants_prompt_logprobs:
            return []
        hits: Found = list(self._pool.match(request.digests[: self._most(request)], request.tokens))
        if self._stored is not None:
            found = self._within_window(request, [*hits, *self._in_tier(request, len(hits), self._stored)])
            asked = found.count(None), self._num_tokens(request, found) - len(hits) * self._pool.block_size
            if None not in found or self._stored.pays(*asked, beside and self._window is None):
                return found
        return self._within_window(request, hits)

    def meets(self, request: Request, found: Found) -> bool:
        """Return whether the request should compute the first blocks that it lacks while the last ones are loaded."""
        if self._window is not None or self._stored is None or None not in found:
            return False  # tokens behind a sliding window are not computed at all
        num_lacking = self._num_tokens(request, found) - num_here(found) * self._pool.block_size
        return self._stored.pays_beside(found.count(None), num_lacking)

    def comes_soon(self, request: Request, found: Found) -> bool:
        """Return whether another request is computing or loading the first block that this one lacks."""
        lacks = num_here(found)
        if lacks >= self._num_known(request) or request.wants_prompt_logprobs:
            return False
        return request.digests[lacks] in self._in_flight

    def take(self, request: Request, found: Found) -> None:
        """Start the request from the blocks of ``found`` before the first missing one. It computes the others, or
        ``load`` gets blocks for those that a tier loads."""
        self._pool.share(block for block in found if block is not None)
        hit = [block for block in found[: num_here(found)] if block is not None]
        request.block_table.replace(self._pool, hit)
        self._begin(request, len(hit), len(hit) * self._pool.block_size)
        self.num_queries += len(request.tokens)
        self.num_hits += request.num_computed
        if self._stored is not None:
            self.num_asked += len(request.tokens) - request.num_computed
        for digest in request.digests[len(hit) :]:
            self._in_flight.setdefault(digest, request)

    def publish(self, request: Request, num_computed: int) -> None:
        """Let other requests find the blocks that the request has filled with its first ``num_computed`` tokens."""
        if not self._enabled:
            return
        full = num_computed // self._pool.block_size
        self.digest(request, full * self._pool.block_size)
        self._publish(request, full)

    def distrust(self, request: Request) -> None:
        """Make the blocks of a request unfindable, and those that it fills later, because its results were not
        finite."""
        self.abandon(request)
        self._pool.forget(request.block_table)
        request.num_published = sys.maxsize

    def abandon(self, request: Request) -> None:
        """Let no request wait for blocks that this one would have filled."""
        for digest in request.digests[request.num_published :]:
            self._landed(request, digest)

    def forget_all(self, running: Iterable[Request]) -> None:
        """Make all K/V computed until now unfindable, because they belong to a model that has changed. Running requests
        go on with theirs."""
        self._pool.forget_all()
        self._in_flight.clear()
        for request in running:
            request.num_published = sys.maxsize  # their blocks are from before and after the change

    def check(self) -> None:
        at_it = (RequestStatus.RUNNING, RequestStatus.LOADING)
        assert all(owner.status in at_it for owner in self._in_flight.values())

    # ---- to a tier and back --------------------------------------------------------------------------------------

    def swap_out(self, request: Request) -> None:
        """Store the partly filled last block of a request that is about to be preempted. No other request can find it.
        With it in a tier, the request will continue where it was."""
        if self._stored is None:
            return
        self._preempted = [*self._still_waiting(), request]
        full, rest = divmod(request.num_computed, self._pool.block_size)
        if not rest or request.num_published != full or not self._stored.wants_back:
            return
        request.num_swapped = request.num_computed
        self._pool.give_up(self._last_content(request, request.block_table[full]))

    def asked_back(self) -> set[bytes]:
        """Return the digests of the blocks of preempted requests that still wait."""
        self._preempted = self._still_waiting()
        found = {digest for request in self._preempted for digest in request.digests}
        return found | {self._last_digest(request) for request in self._preempted if request.num_swapped}

    def _still_waiting(self) -> list[Request]:
        return [each for each in self._preempted if each.status is RequestStatus.WAITING]

    def load(self, request: Request, found: Found, coming: dict[bytes, BlockContent]) -> int:
        """Add the blocks that a tier loads to the request's table, after ``take``. Blocks that are ``coming`` already
        are shared. Returns how many tokens the request will have then."""
        size, num_tokens = self._pool.block_size, self._num_tokens(request, found)
        for i in range(len(request.block_table), len(found)):
            block = found[i]
            if block is None:
                last = (i + 1) * size > num_tokens
                digest = self._last_digest(request) if last else request.digests[i]
                if digest in coming:
                    block = coming[digest].block
                    self._pool.share((block,))
                else:
                    block = self._pool.allocate()
                    coming[digest] = self._last_content(request, block) if last else self._content(request, i, block)
            request.block_table.append(block)
        return num_tokens

    def loaded(self, request: Request, num_tokens: int, lost: Collection[int]) -> None:
        """Note that the request's blocks have come, except those ``lost``. It has the tokens before the first lost
        one."""
        size, table = self._pool.block_size, request.block_table
        num_good = next((i for i, block in enumerate(table) if block in lost), len(table))
        if num_good < len(table):
            if NULL_BLOCK in table:  # the present window begins earlier than these blocks did
                num_good = 0
            num_tokens = num_good * size
            table.shorten(self._pool, num_good)
        self.num_hits += num_tokens - request.num_computed
        num_loaded = max(0, num_tokens - request.num_computed)
        self.num_loaded += num_loaded
        if not request.num_recomputed_to:
            request.num_loaded = num_loaded
        self._begin(request, min(request.num_published, num_good), num_tokens)
        self._publish(request, num_tokens // size)

    def skip(self, request: Request, num_tokens: int) -> None:
        """Note that a running request has the K/V of so many tokens. Those that it has not computed were loaded."""
        num_skipped = num_tokens - request.num_computed
        request.num_computed = num_tokens
        self.num_hits += num_skipped
        self.num_loaded += num_skipped
        if not request.num_recomputed_to:
            request.num_cached += num_skipped
            request.num_loaded += num_skipped
        if num_tokens // self._pool.block_size > request.num_published:
            self.publish(request, num_tokens)

    def _in_tier(self, request: Request, start: int, stored: Stored) -> Iterator[int | None]:
        """Yield what follows the first ``start`` blocks: None for a block in the tier, an id for one in the cache after
        a gap."""
        size, end = self._pool.block_size, self._num_known(request)
        for i in range(start, end):
            block = self._pool.find(request.digests[i], request.tokens[i * size : (i + 1) * size])
            if block is None and not stored.holds(request.digests[i]):
                return
            yield block
        full, rest = divmod(request.num_swapped, size)
        unchanged = request.num_swapped < len(request.tokens)  # the last token is always computed
        if rest and full == end and unchanged and stored.holds(self._last_digest(request)):
            yield None

    def _within_window(self, request: Request, found: Found) -> Found:
        """Replace blocks that are already behind the window by the null block."""
        if self._window is not None:
            num_tokens = self._num_tokens(request, found)
            behind = max(0, (num_tokens + 1 - self._window) // self._pool.block_size)
            found[:behind] = [NULL_BLOCK] * behind
        return found

    def _num_tokens(self, request: Request, found: Found) -> int:
        """Return the tokens in the blocks found. A block beyond those with digests is the last one of a preempted
        request."""
        full = len(found) <= self._num_known(request)
        return len(found) * self._pool.block_size if full else request.num_swapped

    def _last_content(self, request: Request, block: int) -> BlockContent:
        start = request.num_swapped // self._pool.block_size * self._pool.block_size
        tokens = tuple(request.tokens[start : request.num_swapped])
        return BlockContent(block, self._last_digest(request), tokens, request.params.cache_salt)

    def _last_digest(self, request: Request) -> bytes:
        """Return the digest of a preempted request's partly filled block, which only that request can find."""
        full = request.num_swapped // self._pool.block_size
        tokens = request.tokens[full * self._pool.block_size : request.num_swapped]
        owner = f"{request.arrival}.{request.index}"
        return self._pool.digester.private(request.digests[:full], tokens, request.params.cache_salt, owner)

    # ---- the index -----------------------------------------------------------------------------------------------

    def _most(self, request: Request) -> int:
        return (len(request.tokens) - 1) // self._pool.block_size  # the last token is always computed

    def _num_known(self, request: Request) -> int:
        """Return how many leading blocks can be looked up."""
        return min(self._most(request), len(request.digests))

    def _begin(self, request: Request, num_published: int, num_tokens: int) -> None:
        request.num_published, request.num_computed = num_published, num_tokens
        if not request.num_recomputed_to:
            request.num_cached = num_tokens

    def _publish(self, request: Request, full: int) -> None:
        size, digests, salt = self._pool.block_size, request.digests, request.params.cache_salt
        for i in range(request.num_published, full):
            block = request.block_table[i]
            if block != NULL_BLOCK:
                tokens = request.tokens[i * size : (i + 1) * size]
                self._pool.publish(block, digests[i], tokens, salt, digests[i - 1] if i else None)
            self._landed(request, digests[i])
        request.num_published = full

    def _content(self, request: Request, i: int, block: int) -> BlockContent:
        size = self._pool.block_size
        tokens = tuple(request.tokens[i * size : (i + 1) * size])
        return BlockContent(block, request.digests[i], tokens, request.params.cache_salt)

    def _landed(self, request: Request, digest: bytes) -> None:
        if self._in_flight.get(digest) is request:
            del self._in_flight[digest]


def num_here(found: Found) -> int:
    """Return how many blocks of the cache come before the first one that a tier holds."""
    return found.index(None) if None in found else len(found)
