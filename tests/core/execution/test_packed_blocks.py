"""Blocks as plain bytes, of a cache whose layers lie on several devices."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from paged_core.execution.kv_cache import KVCache
from paged_core.execution.packed_blocks import pack, unpack

NUM_BLOCKS, KV_HEADS, SIZE, DIM = 9, 2, 4, 8


class Elsewhere(torch.Tensor):
    """A stand-in for a tensor on a GPU: it says where it is, and all that is made of it is there too."""

    @property
    def device(self):
        return torch.device("cuda", 1)


@pytest.fixture
def crossings(monkeypatch):
    """Nothing leaves the host in truth; what would is noted."""
    made, moved, seen = torch.tensor, torch.Tensor.to, []

    def tensor(data, *args, device=None, **options):
        seen.append(("ids", str(device)))
        return made(data, *args, **options)

    def to(self, device, *args, **options):
        seen.append(("bytes", str(device)))
        return moved(self, *args, **options) if args or options else self

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return seen


def cache(elsewhere, *, scales):
    """Three layers, the middle one elsewhere, or all here."""

    def filled(i, *shape, dtype):
        values = torch.randint(256, (NUM_BLOCKS, *shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
        tensor = values.view(dtype)
        return tensor.as_subclass(Elsewhere) if elsewhere and i == 1 else tensor

    torch.manual_seed(3)
    dtype = torch.int8 if scales else torch.float16
    keys, values = ([filled(i, KV_HEADS, SIZE, DIM, dtype=dtype) for i in range(3)] for _ in range(2))
    scaled = [tuple(filled(i, KV_HEADS, SIZE, dtype=torch.float32) for i in range(3) if scales) for _ in range(2)]
    return KVCache(tuple(keys), tuple(values), SIZE, None, *scaled)


def packed(of, blocks):
    data = torch.empty(len(blocks), of.block_bytes, dtype=torch.uint8)
    pack(of, blocks, data)
    return data


@pytest.mark.parametrize("scales", [False, True], ids=["float16", "int8 with scales"])
def test_a_blocks_bytes_are_the_same_wherever_its_layers_are_and_go_back_to_each_device(crossings, scales):
    here, there = cache(False, scales=scales), cache(True, scales=scales)
    data = packed(there, [3, 7])
    assert torch.equal(data, packed(here, [3, 7]))
    unpack(there, [8, 1], data)
    assert torch.equal(packed(there, [8, 1]), data)
    assert torch.equal(packed(there, [2, 4]), packed(here, [2, 4])), "other blocks are as they were"
    assert {device for _, device in crossings} == {"cuda:1"}
    num_parts = len([device for device, _ in groupby(there.tensors, key=lambda tensor: tensor.device.type)]) // 2
    assert crossings.count(("bytes", "cuda:1")) == num_parts, "one crossing for neighbours on a device"
