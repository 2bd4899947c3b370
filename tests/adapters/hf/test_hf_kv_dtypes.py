"""SmolLM2 with K/V in int8: chunks, hits in the prefix cache and preemption change no token, and memory shrinks."""

from __future__ import annotations

from typing import Any

import pytest

from paged_core import Engine, EngineConfig, SamplingParams
from paged_hf.loading.load import load_model

PROMPTS = [list(range(400 + 31 * i, 400 + 31 * i + 14)) for i in range(3)]
PARAMS = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_model("smollm2")


def make_engine(model: Any, **config: Any) -> Engine:
    return Engine(model, EngineConfig(kv_cache_dtype="int8", block_size=4, **config))


def run(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, PARAMS)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            tokens[int(output.request.id)] += output.token_ids
    return tokens


def test_smollm2_gives_the_same_tokens_however_its_steps_are_cut(smollm2: Any) -> None:
    roomy = make_engine(smollm2, num_blocks=100)
    alone = [run(roomy, [prompt])[0] for prompt in PROMPTS]
    assert run(roomy, PROMPTS) == alone
    assert roomy.last_stats is not None and roomy.last_stats.total_prefix_hits >= 3 * 12
    tight = make_engine(smollm2, num_blocks=8, max_num_batched_tokens=9, max_num_seqs=3, watermark=0)
    assert run(tight, PROMPTS) == alone
    assert tight.last_stats is not None and tight.last_stats.total_preemptions > 0


def test_the_same_bytes_hold_nearly_four_times_the_tokens(smollm2: Any) -> None:
    blocks = {}
    for dtype in ("float32", "bfloat16", "int8"):
        config = EngineConfig(kv_cache_dtype=dtype, kv_cache_bytes=20_000_000, fast_forwards=False)
        num_blocks = Engine(smollm2, config).sizes.num_blocks
        assert num_blocks
        blocks[dtype] = num_blocks
    assert blocks["int8"] / blocks["float32"] > 3.7  # a head of 64: 64 bytes and 4, in place of 256
    assert blocks["int8"] / blocks["bfloat16"] > 1.8
