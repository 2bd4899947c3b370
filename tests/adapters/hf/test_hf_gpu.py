"""transformers models with the GPU's attention, forwards and graphs, beside stock on the same device.

Where there is no GPU, Triton's interpreter runs the kernels on a few tokens; with one, all that steps do there runs.
"""

import pytest
import torch

from interpreter import DEVICE, ON_GPU
from paged_core import Engine, EngineConfig, SamplingParams

NUM_TOKENS = 40 if ON_GPU else 3
LONGEST = 26 if ON_GPU else 11  # of the prompts: longer than the windows
MODELS = {
    "llama": {"num_hidden_layers": 2},
    "gemma2": {"num_hidden_layers": 2, "sliding_window": 9},
    "gpt_oss": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_stocks(name, tiny, prompts):
    model = tiny(name, **MODELS[name]).to(DEVICE)
    engine = Engine(model, EngineConfig(num_blocks=64, block_size=16, max_num_seqs=3, attention_backend="triton"))
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [prompt[:LONGEST] for prompt in prompts]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    tokens = {str(index): [] for index in range(len(prompts))}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            tokens[output.request.id] += output.token_ids
    assert list(tokens.values()) == [_stock(model, prompt) for prompt in prompts]
    assert engine.last_stats.total_late_compiles == 0
    if ON_GPU and name != "gpt_oss":  # float32 experts of its kind wait for the device
        assert engine.captured_steps


def _stock(model, prompt):
    ids = torch.tensor([prompt], device=DEVICE)
    rows = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0
    )
    return rows[0, len(prompt) :].tolist()
