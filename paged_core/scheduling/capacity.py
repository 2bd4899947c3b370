"""Which requests can never fit, and how far a request may grow. Both are decided once, when it is added."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from paged_core.scheduling.params import InvalidRequestError
from paged_core.scheduling.request import Request
from paged_core.scheduling.schedule import Limits


def max_blocks_at_once(limits: Limits, block_size: int) -> int:
    """Return the most blocks that one sequence can hold at any time: fewer if every layer has a sliding window."""
    if limits.sliding_window is None:
        return sys.maxsize
    return -(-(limits.sliding_window + limits.max_num_batched_tokens) // block_size) + 1


def set_max_total(
    requests: Sequence[Request], at_once: Sequence[Request], limits: Limits, num_blocks: int, block_size: int
) -> None:
    """Set each request's ``max_total``. ``at_once``: those of ``requests`` that must be in the cache together.

    Raises:
        InvalidRequestError: they can never fit. The message has the numbers, and ``param`` names the field that is too
            large.
    """
    if len(requests) > limits.max_num_seqs:
        raise InvalidRequestError(
            f"{len(requests)} sequences were asked for at once, but max_num_seqs is {limits.max_num_seqs}; "
            "ask for fewer, or raise it",
            "n",
        )
    longest = max(request.num_prompt for request in requests)
    if longest >= limits.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {longest} tokens; with one more to generate it exceeds max_model_len "
            f"({limits.max_model_len})",
            "prompt",
        )
    share = limits.max_model_len  # tokens that fit beside the others, for requests that set no max_tokens
    if limits.sliding_window is None:
        share = min(share, num_blocks // len(at_once) * block_size)
    for request in requests:
        asked = request.params.max_tokens
        most = share if asked is None else request.num_prompt + asked
        request.max_total = max(min(most, limits.max_model_len), request.num_prompt + 1)
    bound = max_blocks_at_once(limits, block_size)
    # The last token of a sequence needs no slot, because the model never reads it.
    needed = sum(min(-(-(request.max_total - 1) // block_size), bound) for request in at_once)
    if needed > num_blocks:
        raise InvalidRequestError(
            f"the request may need {needed} K/V blocks but the cache has {num_blocks} "
            f"({num_blocks * block_size} tokens); shorten the prompt, lower max_tokens, or raise kv_cache_bytes",
            "max_tokens" if any(request.params.max_tokens is not None for request in requests) else "prompt",
        )
