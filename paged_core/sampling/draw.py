"""From final scores to tokens: argmax, the k largest, and one draw a row by inverse CDF.

This file knows temperature, min_p, top_k, top_p and seeds. Reductions over the vocabulary go by chunks of consecutive
ids: one fast pass for the chunks' maxima or sums, then a close look at the few chunks that matter.

Every result depends on its own row only, bit for bit: random numbers are counted, not drawn from a stream; sums run in
float64 in a fixed order; no reduction has a single output (torch would split that one over threads).

Order of the CDF: rows cut by top_k or top_p go through their tokens by (weight descending, id ascending) and keep the
first k, or the fewest that hold the mass; all other rows go in order of id.
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

_CHUNK = 128  # ids in a chunk when one chunk is looked at
_TOP_CHUNK = 64  # ids in a chunk when k chunks are
_NUCLEUS = 64  # tokens in which top_p first looks for its mass
_FLOOR = -60.0  # log-weights below can't be drawn: e**-60 is far under the 2**-53 step of a uniform
_BLOCK_ELEMENTS = 1 << 18  # elements of float32 rows that fit into a core's cache
_LOW32 = 0xFFFFFFFF


def argmax_rows(scores: Tensor) -> tuple[Tensor, Tensor]:
    """``scores [S,V] -> (id i64 [S], largest [S])``; the lowest id among equals; a row with NaN answers NaN."""
    peaks = _by_chunk(scores, torch.amax, _CHUNK)  # [S,C]
    chunk = peaks.argmax(1)  # the first chunk among equals; NaN counts as largest
    ids, inside = _ids_of_chunks(chunk[:, None], _CHUNK, scores.shape[1])  # [S,128]
    values = scores.gather(1, ids).masked_fill_(~inside, float("-inf"))
    place = values.argmax(1, keepdim=True)
    return ids.gather(1, place)[:, 0], values.gather(1, place)[:, 0]


def top_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``scores float32 [S,V] -> (values [S,k], ids i64 [S,k])`` by (value descending, id ascending), k at most V.

    The k chunks of the largest maxima (the lowest chunks among equals) hold the k largest elements.
    """
    num_ids = scores.shape[1]
    if 2 * k * _TOP_CHUNK < num_ids:
        peaks = _by_chunk(scores, torch.amax, _TOP_CHUNK)  # [S,C]
        chunks = _top_keys(peaks, torch.arange(peaks.shape[1], device=scores.device), k)
        ids, inside = _ids_of_chunks(chunks, _TOP_CHUNK, num_ids)  # [S,64k]
        values = scores.gather(1, ids).masked_fill_(~inside, float("-inf"))
        ids = torch.where(inside, ids, num_ids + 1)  # behind every real token, were it also -inf
    else:
        values, ids = scores, torch.arange(num_ids, device=scores.device)
    top = _top_keys(values, ids, k).clamp_(max=num_ids - 1)  # NaN may rank below what is outside: its row has failed
    return scores.gather(1, top), top


def uniform(request: Request, num_unknown: int = 0) -> float:
    """A number in [0, 1) that is a function of (seed, index, position in the output) and nothing else.

    ``num_unknown``: tokens that it has beside those the host knows.
    """
    counter = b"%d,%d" % (request.index, request.num_output + num_unknown)
    digest = blake2b(counter, key=b"%d" % request.seed, digest_size=8, person=b"paged-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw_waits(request: Request, num_ids: int) -> bool:
    """Whether drawing for it has the host wait for the device: to hear if a nucleus is wide."""
    return not request.params.greedy and _way(request, num_ids)[0] == "top_p"


def draw_rows(
    scores: Tensor,
    largest: Tensor,
    rows: Sequence[int],
    requests: Sequence[Request],
    top: TopRows = top_rows,
    num_unknown: int = 0,
) -> tuple[list[int], Tensor]:
    """A token for each of ``rows`` of ``scores float32 [S,V]``, which may be overwritten: the rows, and their tokens
    ``i64 [len(rows)]`` on the device.

    ``largest [S]`` holds each row's maximum; where it isn't finite any token comes out. ``requests[i]`` belongs to
    ``rows[i]``, and has ``num_unknown`` more tokens than the host knows. Rows are drawn together with those that are
    cut in the same way.
    """
    alike: dict[tuple[str, int], list[int]] = {}  # way of cutting -> places in rows
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
        """exp of the tempered scores, 1 at the largest, 0 below min_p: float32 [R,V], in the place of the scores."""
        columns = (self.scores, self.largest, self.inverse_temperature.float(), self.min_p.float())
        for x, largest, inverse, min_p in zip(*(torch.split(c, self._rows_at_once()) for c in columns), strict=True):
            # exp of what underflows is some 50 times slower, so it never gets to see it
            x.sub_(largest).mul_(inverse).clamp_(min=_FLOOR - 1).exp_()
            torch.threshold_(x, math.exp(_FLOOR), 0.0)
            if self.any_min_p:  # by a float mask: masked_fill is five times slower
                x.mul_(torch.ge(x, min_p, out=torch.empty_like(x)))
        return self.scores

    def _rows_at_once(self) -> int:
        """A CPU passes several times over rows that stay in its cache meanwhile; a GPU takes all at once."""
        rows, num_ids = self.scores.shape
        return max(1, _BLOCK_ELEMENTS // num_ids) if self.scores.device.type == "cpu" else rows


def _way(request: Request, num_ids: int) -> tuple[str, int]:
    params = request.params
    if 0 < params.top_k < num_ids:
        return "top_k", params.top_k.bit_length()  # a large k must not make small ones slow
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
    wide = (sums[:, -1:] < mass)[:, 0].nonzero()[:, 0]  # rows whose nucleus has more tokens than that
    if len(wide):
        tokens[wide] = _draw_from_sorted(weights[wide], mass[wide], batch.uniform[wide])
    return tokens


def _draw_all(batch: _Rows) -> Tensor:
    return _draw_by_id(batch.weights(), batch.uniform)


_DRAWS: dict[str, Callable[[_Rows], Tensor]] = {"top_k": _draw_top_k, "top_p": _draw_top_p, "all": _draw_all}


def _draw_sorted(sums: Tensor, mass: Tensor, uniform: Tensor) -> Tensor:
    """``sums float64 [R,N]`` of weights in falling order; keep the fewest that hold ``mass``, draw -> place [R,1]."""
    last = torch.searchsorted(sums, mass).clamp_(max=sums.shape[1] - 1)
    return _first_above(sums, uniform * sums.gather(1, last), sums.gather(1, last))


def _draw_by_id(weights: Tensor, uniform: Tensor) -> Tensor:
    """``weights float32 [R,V] -> id [R]``."""
    sums = _sums(weights)
    return _locate(weights, sums, uniform * sums[:, -1:])[0][:, 0]


def _draw_from_sorted(weights: Tensor, mass: Tensor, uniform: Tensor) -> Tensor:
    """As _draw_top_p's first look, over all of ``weights [R,V]`` -> id [R]."""
    values = _falling(weights)
    sums = _sums(values)
    last, kept = _locate(values, sums, torch.nextafter(mass, torch.zeros_like(mass)))  # where it is mass or above
    place = torch.minimum(_locate(values, sums, uniform * kept)[0], last)
    value = values.gather(1, place)
    equals_before = (place - torch.searchsorted(-values, -value))[:, 0]  # of the same weight, earlier in the order
    equal = weights == value
    counts = equal.sum(1, dtype=torch.int32)
    return equal.nonzero()[counts.cumsum(0) - counts + equals_before, 1]


def _locate(weights: Tensor, sums: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of ``weights [R,N]`` first is above ``target [R,1]``, and the sum there: [R,1] each.

    ``sums`` are ``_sums(weights)``: they tell the chunk, and only that is looked at.
    """
    chunk = _first_above(sums, target, sums[:, -1:])
    before = torch.where(chunk > 0, sums.gather(1, (chunk - 1).clamp_(min=0)), 0.0)
    places, inside = _ids_of_chunks(chunk, _CHUNK, weights.shape[1])
    within = weights.gather(1, places).masked_fill_(~inside, 0.0).cumsum(1, dtype=torch.float64)
    place = _first_above(within, target - before, within[:, -1:])
    return places.gather(1, place), before + within.gather(1, place)


def _falling(weights: Tensor) -> Tensor:
    """The values of each row from large to small."""
    if weights.device.type != "cpu":
        return weights.sort(1, descending=True).values
    values = weights.neg().numpy()  # numpy sorts floats ten times as fast as torch does on a CPU
    values.sort(axis=1)
    return torch.from_numpy(values).neg_()


def _first_above(sums: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """First place in ``sums float64 [R,N]`` above ``target [R,1]``, kept below ``total`` so that its weight isn't 0."""
    limit = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(sums, torch.minimum(target, limit), right=True).clamp_(max=sums.shape[1] - 1)


def _sums(weights: Tensor) -> Tensor:
    """Running sums over chunks: float64 [R,C]."""
    return _by_chunk(weights, torch.sum, _CHUNK).cumsum(1, dtype=torch.float64)


def _by_chunk(x: Tensor, reduce: Callable[..., Tensor], size: int) -> Tensor:
    """``x [R,V]`` reduced over chunks of ``size`` consecutive ids: [R,C]."""
    whole = x.shape[1] // size
    parts = []
    if whole:
        parts.append(reduce(x[:, : whole * size].view(len(x), whole, size), 2))
    if whole * size < x.shape[1]:
        parts.append(reduce(x[:, whole * size :], 1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _ids_of_chunks(chunks: Tensor, size: int, num_ids: int) -> tuple[Tensor, Tensor]:
    """``chunks i64 [R,N] -> ids i64 [R,N*size]``, and which are inside the vocabulary (others read its last)."""
    ids = (chunks[:, :, None] * size + torch.arange(size, device=chunks.device)).flatten(1)
    return ids.clamp(max=num_ids - 1), ids < num_ids


def _top_keys(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """The ids of the k largest values by (value descending, id ascending): one int64 key holds both."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # int32 in the order of the floats
    keys = (ordered.long() << 32) | (_LOW32 - ids)
    return _LOW32 - (keys.topk(k).values & _LOW32)
