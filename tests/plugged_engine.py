"""A tiny engine with plugins, and three prompts for it."""

from __future__ import annotations

from paged_core import Engine, EngineConfig, SamplingParams
from tiny_model import TinyModel

PROMPTS = {"long": [5, 6, 7, 8, 9, 10, 11, 12, 13], "short": [20, 21, 22], "middle": [30, 31, 32, 33, 34, 35]}


def engine_of(*plugins, **config) -> Engine:
    config = {"num_blocks": 64, "block_size": 4, "attention_backend": "reference", **config}
    return Engine(TinyModel(), EngineConfig(**config), plugins=plugins)


def run(engine: Engine) -> tuple[list[str], dict[str, list[int]]]:
    """(ids in order of completion, tokens by id)"""
    order: list[str] = []
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request.id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                order.append(output.request.id)
    return order, tokens


def answer_all(engine: Engine, num_tokens: int = 6) -> tuple[list[str], dict[str, list[int]]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for request_id, prompt in PROMPTS.items():
        engine.add_request(request_id, prompt, params)
    return run(engine)


def truth(num_tokens: int = 6) -> dict[str, list[int]]:
    return {request_id: TinyModel().generate(prompt, num_tokens) for request_id, prompt in PROMPTS.items()}
