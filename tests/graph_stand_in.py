"""A recorder of operations that replaces CUDA graphs in tests, and attention that can be recorded. On any device.

Like a CUDA graph, it repeats operations on the tensors with which they were captured. A number that Python has read or
computed keeps its value from the capture, and work that would wait for a device can't be captured.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paged_core import hookimpl
from paged_core.builtin.attention import ReferenceBackend
from paged_kernels.layers import LayerCache

_WAITS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique",
}


class OpRecorder(TorchDispatchMode):
    def __init__(self, device=None):
        super().__init__()
        self._ops = None

    def __call__(self, work):
        work()
        self._ops = ops = []
        with self:
            work()
        return lambda: [_again(*op) for op in ops]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        indices = tree_leaves(args[1]) if name.startswith("aten::index") and len(args) > 1 else []
        if name in _WAITS or any(isinstance(i, torch.Tensor) and i.dtype is torch.bool for i in indices):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **(kwargs or {}))
        self._ops.append((func, args, kwargs or {}, out))
        return out


def _again(func, args, kwargs, out):
    for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
            old.copy_(new)


class CapturableBackend(ReferenceBackend):
    """Dense attention over whole block tables, with tensor operations only, for any lengths."""

    name = "capturable"
    capturable = True

    def run(self, layer, q, k, v, cache, sinks=None, key_bias=None):
        meta, facts = self._metadata, self._layers[layer]
        if meta.max_query_len > 1:
            return super().run(layer, q, k, v, cache, sinks, key_bias)
        keys, values = cache.keys[layer], cache.values[layer]
        self._ops.store_kv(k, v, LayerCache(keys, values), meta.slot_mapping)
        tables = meta.block_tables.long()  # [R,B]
        k, v = (x[tables].transpose(2, 3).flatten(1, 2) for x in (keys, values))  # [R,P,K,D]
        k, v = (x.repeat_interleave(facts.num_heads // facts.num_kv_heads, dim=2) for x in (k, v))  # [R,P,H,D]
        scores = torch.einsum("rhd,rphd->rhp", q.float(), k.float()) * facts.scale
        place = torch.arange(k.shape[1], device=q.device)
        lens = meta.seq_lens[:, None, None]
        hidden = place >= lens
        if facts.sliding_window is not None:
            hidden = hidden | (place < lens - facts.sliding_window)
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()  # a padding row has no keys
        v = v.float().masked_fill(hidden.transpose(1, 2)[..., None], 0)  # memory that was never written may hold NaN
        return torch.einsum("rhp,rphd->rhd", probs, v).to(q.dtype)


class CapturablePlugin:
    @hookimpl
    def create_attention_backend(self, name, spec):
        return CapturableBackend(spec)
