"""The policy "shortest" (shortest prompt first) and the attention backend "gather" (copy the keys, then softmax).

At its top it imports paged_core only, as every plugin should, because it is loaded for each engine and by the `paged`
command.
"""

from paged_core import hookimpl


@hookimpl
def create_scheduling_policy(name):
    return ShortestFirst() if name == "shortest" else None


@hookimpl
def create_attention_backend(name, spec):
    if name != "gather" or any(
        layer.sliding_window or layer.softcap or layer.has_sinks or layer.has_key_bias for layer in spec.layers
    ):
        return None  # run() below does not honour this fact, so let another backend have the model
    return Gather(spec)


class ShortestFirst:
    def key(self, request):
        return request.num_prompt


class Gather:
    name = "gather"

    def __init__(self, spec):
        self._layers = spec.layers

    def plan(self, metadata):
        self._starts = metadata.query_starts.tolist()
        self._lens = metadata.seq_lens.tolist()
        self._tables = metadata.block_tables.long()
        self._slots = metadata.slot_mapping

    def run(self, layer, q, k, v, cache, sinks=None):
        keys, values, size = cache.keys[layer], cache.values[layer], cache.block_size
        keys[self._slots // size, :, self._slots % size] = k.to(keys.dtype)
        values[self._slots // size, :, self._slots % size] = v.to(values.dtype)
        out = q.new_empty(*q.shape[:2], v.shape[-1])  # [T,H,Dv]
        for r, seq_len in enumerate(self._lens):
            rows = slice(self._starts[r], self._starts[r + 1])
            blocks = self._tables[r, : -(-seq_len // size)]
            out[rows] = self._attend(
                q[rows], _gather(keys, blocks, seq_len), _gather(values, blocks, seq_len), self._layers[layer].scale
            )
        return out

    def copy_blocks(self, cache, pairs):
        for source, target in pairs:
            for tensor in (*cache.keys, *cache.values):
                tensor[target] = tensor[source]

    def _attend(self, q, k, v, scale):
        """Return ``q [n,H,D], k [L,K,D], v [L,K,Dv] -> [n,H,Dv]``: the n queries are the last of L tokens."""
        num_queries, num_heads = q.shape[:2]
        k, v = (x.repeat_interleave(num_heads // x.shape[1], dim=1).float() for x in (k, v))
        scores = q.float().transpose(0, 1) @ k.permute(1, 2, 0) * scale  # [H,n,L]
        future = scores.new_ones(num_queries, len(k)).triu(len(k) - num_queries + 1).bool()
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return (weights @ v.transpose(0, 1)).transpose(0, 1).to(q.dtype)


def _gather(cache, blocks, seq_len):
    """Return the tokens of one request, one after another: ``[L,K,D]``."""
    return cache[blocks].transpose(1, 2).flatten(0, 1)[:seq_len]
