"""Attention as an operator: a compiled model calls it and gives the same answers, step after step."""

import gc

import pytest
import torch
import torch._dynamo.testing
from transformers import LlamaConfig, LlamaForCausalLM

from paged_core import ConfigError, Engine, EngineConfig
from paged_core.execution.attend_op import AttendOp
from paged_hf.model.attention import CountedAttend
from paged_hf.model.paged_model import HFPagedModel
from tiny_model import TinyModel


def recording(seen):
    """An attention of no meaning that tells layers, heads and tokens apart."""

    def attend(layer, q, k, v, sinks=None, key_bias=None):
        seen.append((layer, len(q)))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return (q.tanh() * k + v.cumsum(0) + layer).contiguous()

    return attend


def qkv(num_tokens=5):
    return (torch.randn(num_tokens, heads, 16) for heads in (4, 2, 2))


def test_the_operator_keeps_what_torch_asks_of_one():
    op = AttendOp(recording([]))
    torch.library.opcheck(torch.ops.paged_core.attend, (*qkv(), None, None, 1, op.handle), test_utils=(
        "test_schema", "test_faketensor"))  # fmt: skip


def test_a_model_that_can_not_be_compiled_is_refused_by_name_of_the_choice():
    with pytest.raises(ConfigError, match="TinyModel can't be compiled; leave it out"):
        Engine(TinyModel(), EngineConfig(num_blocks=8, attention_backend="reference", compile_model=True))


def test_each_engines_attention_is_its_own():
    first, second = [], []
    ops, given = [AttendOp(recording(first)), AttendOp(recording(second))], tuple(qkv())
    ops[1](3, *given)
    assert (first, second) == ([], [(3, 5)])


def test_an_engine_that_is_gone_is_not_kept_by_its_operator():
    op, given = AttendOp(recording([])), tuple(qkv())
    handle = op.handle
    del op
    gc.collect()
    with pytest.raises(KeyError):
        torch.ops.paged_core.attend(*given, None, None, 0, handle)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_has_no_breaks_needs_no_new_graph_for_new_lengths_and_answers_the_same():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    paged = HFPagedModel(LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval())
    seen = []
    op = AttendOp(recording(seen))

    def logits(root, num_tokens, attend):
        positions = torch.arange(num_tokens)
        step = CountedAttend(attend, positions)
        with torch.no_grad():
            given = {"input_ids": 7 * positions[None] % 97, "position_ids": positions[None], "attend": step}
            out = root(**given, attention_mask=None, use_cache=False).logits
        assert step.layer == 2
        return out

    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    root = torch.compile(paged.shadow.root, backend=counted, fullgraph=True, dynamic=True)
    counts = []
    for num_tokens in (3, 5, 9, 4):
        expected = logits(paged.shadow.root, num_tokens, recording([]))
        torch.testing.assert_close(logits(root, num_tokens, op), expected)
        counts.append(counted.frame_count)
    assert counts[1] == counts[-1] <= 2
    assert seen == [(layer, num) for num in (3, 5, 9, 4) for layer in (0, 1)]
    torch._dynamo.reset()
