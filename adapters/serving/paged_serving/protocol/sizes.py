"""The combined size of a request's fields, each of which is small alone. Knows no protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from paged_core import Prompt, SamplingParams
from paged_serving.protocol.parsing import ProtocolError

_IDS = ("allowed_token_ids", "logit_bias", "stop_token_ids", "bad_words_token_ids")


def check_sizes(
    params: SamplingParams,
    prompts: Sequence[Prompt],
    max_model_len: int,
    limit: int,
    *,
    copies: int,
    named: Mapping[str, str],
) -> None:
    """``copies``: how often the answer tells of each prompt's tokens. ``named``: what the protocol at hand calls a
    field, where its name is another.

    Raises:
        ProtocolError: more than ``limit`` values (log-probabilities, token ids); it names the fields and the limit.
    """
    for fields, what, total in _sizes(params, prompts, max_model_len, copies):
        if total > limit:
            names = [named.get(field, field) for field in fields]
            told = f"{', '.join(names[:-1])} and {names[-1]} together come to {total} {what}"
            raise ProtocolError(f"{told}; this server's limit is {limit}: lower one of them", names[0])


def _sizes(
    params: SamplingParams, prompts: Sequence[Prompt], max_model_len: int, copies: int
) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """(the fields that make it, of what, how much)."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    ids = {name: _num_ids(params, name) for name in _IDS}
    largest = max(ids, key=lambda name: ids[name])
    yield (largest, "n", "prompt"), "token ids to look after", sum(ids.values()) * params.n * len(prompts)
    if params.logprobs is not None:
        most = max_model_len if params.max_tokens is None else params.max_tokens
        num_new = sum(min(most, max_model_len - length) for length in lengths) * params.n
        yield ("logprobs", "max_tokens", "n", "prompt"), "log-probabilities", num_new * (params.logprobs + 1)
    if params.prompt_logprobs is not None:
        total = sum(lengths) * copies * (params.prompt_logprobs + 1)
        yield ("prompt_logprobs", "n", "prompt"), "log-probabilities", total
    yield ("echo", "n", "prompt"), "token ids", sum(lengths) * copies


def _num_ids(params: SamplingParams, name: str) -> int:
    value = getattr(params, name) or ()
    return sum(map(len, value)) if name == "bad_words_token_ids" else len(value)
