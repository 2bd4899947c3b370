"""From final scores to tokens: argmax, the k largest, and one draw for each row by inverse CDF.

This file knows temperature, min_p, top_k, top_p and seeds. Reductions over the vocabulary are made in two passes: a
fast one for the maxima or sums of chunks of consecutive ids, then one over the few chunks that matter.

Every result depends on its own row only, bit for bit. Random numbers are computed from a counter, not drawn from a
stream. Sums are computed in float64 in a fixed order. No reduction has a single output, since torch would split it over
threads.

The order of the CDF: rows limited by top_k or top_p order their tokens by (weight descending, id ascending), and keep
the first k, or the fewest that hold the mass. All other rows order them by id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from paged_core.execution.staging import take_rows, upload
from paged_core.scheduling.request import Request

ArgmaxRows = Callable[[Tensor], tuple[Tensor, Tensor]]
TopRows = Callable[[Tensor, int], tuple[Tensor, Tensor]]

_CHUNK = 128  # ids of a chunk, where one chunk is examined
_TOP_CHUNK = 64  # ids of a chunk, where k chunks are examined
_NUCLEUS = 64  # top_p first looks for its mass in this many tokens
_FLOOR = -60.0  # smaller log-weights can't be drawn: e**-60 is far below the 2**-53 step of a uniform number
_BLOCK_ELEMENTS = 1 << 18  # elements of float32 rows that fit into a core's cache
_LOW32 = 0xFFFFFFFF


def argmax_rows(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``scores [S,V] -> (id i64 [S], largest [S])``: the lowest id of equals; NaN for a row with NaN."""
    peaks = _by_chunk(scores, torch.amax, _CHUNK)  # [S,C]
    chunk = peaks.argmax(1)  # the first chunk of equals; NaN counts as the largest
    ids, inside = _ids_of_chunks(chunk[:, None], _CHUNK, scores.shape[1])  # [S,128]
    values = scores.gather(1, ids).masked_fill_(~inside, float("-inf"))
    place = values.argmax(1, keepdim=True)
    return ids.gather(1, place)[:, 0], values.gather(1, place)[:, 0]


def top_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ``scores float32 [S,V] -> (values [S,k], ids i64 [S,k])`` by (value descending, id ascending). k is at
    most V.

    The k chunks with the largest maxima (the lowest chunks of equals) hold the k largest elements.
    """
    num_ids = scores.shape[1]
    if 2 * k * _TOP_CHUNK < num_ids:
        peaks = _by_chunk(scores, torch.amax, _TOP_CHUNK)  # [S,C]
        chunks = _top_keys(peaks, torch.arange(peaks.shape[1], device=scores.device), k)
        ids, inside = _ids_of_chunks(chunks, _TOP_CHUNK, num_ids)  # [S,64k]
        values = scores.gather(1, ids).masked_fill_(~inside, float("-inf"))
        ids = torch.where(inside, ids, num_ids + 1)  # so that padding ranks behind every real token, even one at -inf
    else:
        values, ids = scores, torch.arange(num_ids, device=scores.device)
    top = _top_keys(values, ids, k).clamp_(max=num_ids - 1)  # padding may rank before NaN, whose row has failed
    return scores.gather(1, top), top


def uniform(request: Request, num_unknown: int = 0) -> float:
    """Return a number in [0, 1) that depends on (seed, index, position in the output) only.

    ``num_unknown``: the number of tokens that the request has beyond those in ``tokens``.
    """
    counter = b"%d,%d" % (request.index, request.num_output + num_unknown)
    digest = blake2b(counter, key=b"%d" % request.seed, digest_size=8, person=b"paged-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw_waits(request: Request, num_ids: int) -> bool:
    """Return whether drawing for the request makes the host wait for the device, to learn whether a nucleus is wide."""
    return not request.params.greedy and _way(request, num_ids)[0] == "top_p"


def draw_rows(
    scores: Tensor,
    largest: Tensor,
    rows: Sequence[int],
    requests: Sequence[Request],
    top: TopRows = top_rows,
    num_unknown: int = 0,
) -> tuple[list[int], Tensor]:
    """Draw a token for each of ``rows`` of ``scores float32 [S,V]``, which may be overwritten. Returns the rows in the
    order of drawing, and their tokens ``i64 [len(rows)]`` on the device.

    ``largest [S]`` holds each row's maximum; where that isn't finite, the token is arbitrary. ``requests[i]`` belongs
    to ``rows[i]``, and has ``num_unknown`` more tokens than the host knows. Rows limited in the same way are drawn
    together.
    """
    alike: dict[tuple[str, int], list[int]] = {}  # way of limiting -> places in ``rows``
    for place, request in enumerate(requests):
        alike.setdefault(_way(request, scores.shape[1]), []).append(place)
    drawn, order = [], []
    for (way, _), places in alike.items():
        mine = [rows[place] for place in places]
        theirs = [requests[place] for place in places]
        batch = _Rows(take_rows(scores, mine), take_rows(largest, mine), theirs, top, num_unknown)
        drawn.append(_DRAWS[way](batch))
        order += mine
    return order, torch.cat(drawn)


class _Rows:
    """Rows to draw, and their parameters as columns."""

    def __init__(
        self,
        scores: Tensor,
        largest: Tensor,
        requests: Sequence[Request],
        top: TopRows = top_rows,
        num_unknown: int = 0,
    ) -> None:
        self.top = top
        self.scores = scores  # float32 [R,V]
        self.largest = largest.float()[:, None]  # [R,1]
        table = [
            (1 / max(p.temperature, 1e-20), p.min_p, p.top_p, p.top_k, uniform(r, num_unknown))
            for r, p in ((r, r.params) for r in requests)
        ]
        columns = upload(torch.tensor(table, dtype=torch.float64), scores.device).unsqueeze(2).unbind(1)
        self.inverse_temperature, self.min_p, self.top_p, self.top_k, self.uniform = columns  # float64 [R,1] each
        self.largest_k = max(r.params.top_k for r in requests)
        self.any_min_p = any(r.params.min_p > 0 for r in requests)

    def weights(self) -> Tensor:
        """Return exp of the tempered scores: 1 at the largest, 0 below min_p; float32 [R,V], which overwrites the
        scores."""
        columns = (self.scores, self.largest, self.inverse_temperature.float(), self.min_p.float())
        for x, largest, inverse, min_p in zip(*(torch.split(c, self._rows_at_once()) for c in columns), strict=True):
            # exp of values that underflow is some 50 times slower, so they are clamped first.
            x.sub_(largest).mul_(inverse).clamp_(min=_FLOOR - 1).exp_()
            torch.threshold_(x, math.exp(_FLOOR), 0.0)
            if self.any_min_p:  # a product with a float mask: masked_fill is five times slower
                x.mul_(torch.ge(x, min_p, out=torch.empty_like(x)))
        return self.scores

    def _rows_at_once(self) -> int:
        """Return how many rows to handle together: on a CPU few enough to stay in a core's cache, on a GPU all."""
        rows, num_ids = self.scores.shape
        return max(1, _BLOCK_ELEMENTS // num_ids) if self.scores.device.type == "cpu" else rows


def _way(request: Request, num_ids: int) -> tuple[str, int]:
    params = request.params
    if 0 < params.top_k < num_ids:
        return "top_k", params.top_k.bit_length()  # grouped by size of k, so that a large k doesn't slow small ones
    return ("top_p" if params.top_p < 1 else "all"), 0


def _draw_top_k(batch: _Rows) -> Tensor:
    k = batch.largest_k
    values, ids = batch.top(batch.scores, k)
    weights = ((values - batch.largest).double() * batch.inverse_temperature).exp()  # [R,k]
    weights.masked_fill_(weights < batch.min_p, 0)
    weights.masked_fill_(torch.arange(k, device=ids.device) >= batch.top_k, 0)
    sums = weights.cumsum(1)
    return ids.gather(1, _draw_sorted(sums, batch.top_p * sums[:, -1:], batch.uniform))[:, 0]


def _draw_top_p(batch: _Rows) -> Tensor:
    weights = batch.weights()
    mass = batch.top_p * _sums(weights)[:, -1:]  # [R,1]
    values, ids = batch.top(weights, min(_NUCLEUS, weights.shape[1]))
    sums = values.double().cumsum(1)
    tokens = ids.gather(1, _draw_sorted(sums, mass, batch.uniform))[:, 0]
    wide = (sums[:, -1:] < mass)[:, 0].nonzero()[:, 0]  # rows whose nucleus has more tokens than _NUCLEUS
    if len(wide):
        tokens[wide] = _draw_from_sorted(weights[wide], mass[wide], batch.uniform[wide])
    return tokens


def _draw_all(batch: _Rows) -> Tensor:
    return _draw_by_id(batch.weights(), batch.uniform)


_DRAWS: dict[str, Callable[[_Rows], Tensor]] = {"top_k": _draw_top_k, "top_p": _draw_top_p, "all": _draw_all}


def _draw_sorted(sums: Tensor, mass: Tensor, uniform: Tensor) -> Tensor:
    """Draw a place ``[R,1]`` from ``sums float64 [R,N]`` of weights in falling order, of which only the fewest that
    hold ``mass`` are kept."""
    last = torch.searchsorted(sums, mass).clamp_(max=sums.shape[1] - 1)
    return _first_above(sums, uniform * sums.gather(1, last), sums.gather(1, last))


def _draw_by_id(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw an id ``[R]`` from ``weights float32 [R,V]``, in order of id."""
    sums = _sums(weights)
    return _locate(weights, sums, uniform * sums[:, -1:])[0][:, 0]


def _draw_from_sorted(weights: Tensor, mass: Tensor, uniform: Tensor) -> Tensor:
    """Draw an id [R] as _draw_top_p does from few tokens, but from all of ``weights [R,V]``."""
    values = _falling(weights)
    sums = _sums(values)
    last, kept = _locate(values, sums, torch.nextafter(mass, torch.zeros_like(mass)))  # where it is at least the mass
    place = torch.minimum(_locate(values, sums, uniform * kept)[0], last)
    value = values.gather(1, place)
    equals_before = (place - torch.searchsorted(-values, -value))[:, 0]  # tokens of the same weight that come before it
    equal = weights == value
    counts = equal.sum(1, dtype=torch.int32)
    return equal.nonzero()[counts.cumsum(0) - counts + equals_before, 1]


def _locate(weights: Tensor, sums: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the running sum of ``weights [R,N]`` first exceeds ``target [R,1]``, and the sum there: [R,1] each.

    ``sums`` are ``_sums(weights)``. They give the chunk, and only that chunk is examined.
    """
    chunk = _first_above(sums, target, sums[:, -1:])
    before = torch.where(chunk > 0, sums.gather(1, (chunk - 1).clamp_(min=0)), 0.0)
    places, inside = _ids_of_chunks(chunk, _CHUNK, weights.shape[1])
    within = weights.gather(1, places).masked_fill_(~inside, 0.0).cumsum(1, dtype=torch.float64)
    place = _first_above(within, target - before, within[:, -1:])
    return places.gather(1, place), before + within.gather(1, place)


def _falling(weights: Tensor) -> Tensor:
    """Return the values of each row in falling order."""
    if weights.device.type != "cpu":
        return weights.sort(1, descending=True).values
    values = weights.neg().numpy()  # on a CPU, numpy sorts floats ten times as fast as torch
    values.sort(axis=1)
    return torch.from_numpy(values).neg_()


def _first_above(sums: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """Return the first place in ``sums float64 [R,N]`` above ``target [R,1]``. The target is kept below ``total``, so
    that the weight there isn't 0."""
    limit = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(sums, torch.minimum(target, limit), right=True).clamp_(max=sums.shape[1] - 1)


def _sums(weights: Tensor) -> Tensor:
    """Return the running sums over chunks: float64 [R,C]."""
    return _by_chunk(weights, torch.sum, _CHUNK).cumsum(1, dtype=torch.float64)


def _by_chunk(x: Tensor, reduce: Callable[..., Tensor], size: int) -> Tensor:
    """Reduce ``x [R,V]`` over chunks of ``size`` consecutive ids: [R,C]."""
    whole = x.shape[1] // size
    parts = []
    if whole:
        parts.append(reduce(x[:, : whole * size].view(len(x), whole, size), 2))
    if whole * size < x.shape[1]:
        parts.append(reduce(x[:, whole * size :], 1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _ids_of_chunks(chunks: Tensor, size: int, num_ids: int) -> tuple[Tensor, Tensor]:
    """Map ``chunks i64 [R,N] -> ids i64 [R,N*size]``, and return which of them are in the vocabulary (the others are
    clamped to its last id)."""
    ids = (chunks[:, :, None] * size + torch.arange(size, device=chunks.device)).flatten(1)
    return ids.clamp(max=num_ids - 1), ids < num_ids


def _top_keys(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest values by (value descending, id ascending). One int64 key holds both."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0, because -0.0 equals 0.0 and has other bits
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # int32 in the order of the floats
    keys = (ordered.long() << 32) | (_LOW32 - ids)
    return _LOW32 - (keys.topk(k).values & _LOW32)
