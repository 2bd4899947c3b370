"""Placement: chooses the replica of a request, by the blocks that each replica has and by its load. Plain integers and
sets, without Ray, HTTP or clocks; the simulator uses the same class. A prompt is given by the digests of its leading
blocks; a digest covers its block, all blocks before it, and the tenant's salt.

A replica is charged, in prompt tokens, for what it still has to do: the tokens that this request would have it compute,
those of the requests that it was sent and hasn't begun to answer, and a constant for each request that is open. The
request goes to the replica with the smallest sum. So a cached prefix attracts requests as long as it saves more than
its replica's queue costs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

Digest: TypeAlias = Hashable
OPEN_COST = 64  # cost of an open request in prompt tokens: its decoding slows new ones


class CacheChanges(NamedTuple):
    """The changes of a replica's cached blocks since the last question."""

    last: int  # number of the last change: to be asked from next time
    stored: Sequence[Digest]
    removed: Sequence[Digest]
    whole: bool = False  # ``stored`` is the whole content: forget earlier knowledge


@dataclass
class _Replica:
    bit: int  # its place in masks
    last: int = 0  # change that it has reported
    pending_tokens: int = 0  # to compute, of requests that it hasn't begun to answer
    num_open: int = 0
    assumed: set[Digest] = field(default_factory=set)  # digests of prompts that it was sent since its last report
    assumed_before: set[Digest] = field(default_factory=set)  # and between that one and the report before


@dataclass
class _OpenRequest:
    replica: Hashable
    num_new: int  # prompt tokens to compute; 0 once it has begun to answer


class Placement:
    """Follows replicas and the requests under way to them. Not thread-safe; its owner locks.

    Args:
        block_size: tokens of a block.
        open_cost: prompt tokens that an open request weighs.
    """

    def __init__(self, block_size: int, open_cost: int = OPEN_COST) -> None:
        self.block_size = block_size
        self._open_cost = open_cost
        self._replicas: dict[Hashable, _Replica] = {}
        self._free_bits: list[int] = []
        self._holders: dict[Digest, int] = {}  # digest -> mask of replicas that have reported it
        self._assumed: dict[Digest, int] = {}  # digest -> mask of replicas that were sent a prompt with it
        self._open: dict[Hashable, _OpenRequest] = {}
        self.num_sent = 0  # requests, so far
        self._turn = 0

    # ---- replicas --------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> Iterable[Hashable]:
        return self._replicas.keys()

    def update(self, replicas: Iterable[Hashable]) -> None:
        """Set the present replicas; others are forgotten, with their blocks."""
        wanted = set(replicas)
        for gone in self._replicas.keys() - wanted:
            self._forget(gone)
        for new in wanted - self._replicas.keys():
            bit = self._free_bits.pop() if self._free_bits else 1 << len(self._replicas)
            self._replicas[new] = _Replica(bit)

    def cursors(self) -> Mapping[Hashable, int]:
        """The last change that each replica has reported."""
        return {name: replica.last for name, replica in self._replicas.items()}

    def take_in(self, name: Hashable, report: CacheChanges) -> None:
        """Take in a replica's report. Blocks that were assumed before its last report and are not reported are
        dropped."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        if report.whole:
            self._drop(replica.bit)
        _add(self._holders, report.stored, replica.bit)
        for digest in report.removed:
            _remove(self._holders, digest, replica.bit)
        replica.last = report.last
        for digest in replica.assumed_before - replica.assumed:
            _remove(self._assumed, digest, replica.bit)
        replica.assumed_before, replica.assumed = replica.assumed, set()

    # ---- requests --------------------------------------------------------------------------------------------------

    def rank(self, digests: Sequence[Digest], num_tokens: int) -> list[Hashable]:
        """All replicas, the cheapest first. ``num_tokens``: of the prompt."""
        hits = self._hits(digests)
        size, cost = self.block_size, self._open_cost
        self._turn += 1  # equals take turns
        count = max(1, len(self._replicas))
        priced = [
            (
                num_tokens - size * hits.get(replica.bit, 0) + replica.pending_tokens + cost * replica.num_open,
                (number + self._turn) % count,
                name,
            )
            for number, (name, replica) in enumerate(self._replicas.items())
        ]
        return [name for _, _, name in sorted(priced, key=_price)]

    def best(self, digests: Sequence[Digest], num_tokens: int) -> Hashable:
        """The first of ``rank``, without sorting the others."""
        hits = self._hits(digests)
        size, cost = self.block_size, self._open_cost
        self._turn += 1
        found, lowest = None, float("inf")
        names = list(self._replicas.items())
        start = self._turn % len(names)
        for name, replica in names[start:] + names[:start]:
            price = replica.pending_tokens + cost * replica.num_open
            if price - num_tokens < lowest:
                price += num_tokens - size * hits.get(replica.bit, 0)
                if price < lowest:
                    found, lowest = name, price
        return found

    def num_cached(self, name: Hashable, digests: Sequence[Digest]) -> int:
        """Leading blocks of a prompt that a replica is known to have or to compute."""
        replica = self._replicas.get(name)
        return 0 if replica is None else self._hits(digests).get(replica.bit, 0)

    def sent(self, request: Hashable, name: Hashable, digests: Sequence[Digest], num_tokens: int) -> None:
        """``request`` (its name) was sent to a replica, which will have its blocks soon."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        self.ended(request)
        num_new = max(0, num_tokens - self.block_size * self._hits(digests).get(replica.bit, 0))
        self._open[request] = _OpenRequest(name, num_new)
        replica.pending_tokens += num_new
        replica.num_open += 1
        self.num_sent += 1
        replica.assumed.update(digests)
        _add(self._assumed, digests, replica.bit)

    def begun(self, request: Hashable) -> None:
        """Its prompt has been computed."""
        known = self._open.get(request)
        if known is not None and (replica := self._replicas.get(known.replica)):
            replica.pending_tokens -= known.num_new
            known.num_new = 0

    def ended(self, request: Hashable) -> None:
        """However it has ended; unknown ones are ignored."""
        self.begun(request)
        known = self._open.pop(request, None)
        if known is not None and (replica := self._replicas.get(known.replica)):
            replica.num_open -= 1

    # ---- within ----------------------------------------------------------------------------------------------------

    def _hits(self, digests: Sequence[Digest]) -> dict[int, int]:
        """bit of a replica -> number of leading blocks that it has; replicas without any are left out."""
        hits: dict[int, int] = {}
        mask = -1
        for depth, digest in enumerate(digests):
            here = (self._holders.get(digest, 0) | self._assumed.get(digest, 0)) & mask
            if depth and here != mask:
                _note(hits, mask & ~here, depth)
            mask = here
            if not mask:
                return hits
        if digests:
            _note(hits, mask, len(digests))
        return hits

    def _forget(self, name: Hashable) -> None:
        replica = self._replicas.pop(name)
        self._drop(replica.bit)
        for digest in replica.assumed | replica.assumed_before:
            _remove(self._assumed, digest, replica.bit)
        self._free_bits.append(replica.bit)
        for request in [request for request, known in self._open.items() if known.replica == name]:
            del self._open[request]

    def _drop(self, bit: int) -> None:
        for digest in [digest for digest, mask in self._holders.items() if mask & bit]:
            _remove(self._holders, digest, bit)


def _price(priced: tuple[int, int, Hashable]) -> tuple[int, int]:
    return priced[0], priced[1]


def _note(hits: dict[int, int], mask: int, depth: int) -> None:
    while mask:
        bit = mask & -mask
        hits[bit] = depth
        mask ^= bit


def _add(masks: dict[Digest, int], digests: Iterable[Digest], bit: int) -> None:
    for digest in digests:
        masks[digest] = masks.get(digest, 0) | bit


def _remove(masks: dict[Digest, int], digest: Digest, bit: int) -> None:
    mask = masks.get(digest, 0) & ~bit
    if mask:
        masks[digest] = mask
    else:
        masks.pop(digest, None)
