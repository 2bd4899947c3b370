"""Triton's interpreter as it has to be for tests: it cuts float32 off to bfloat16 where every GPU rounds."""

from __future__ import annotations

import numpy
import torch


def round_as_gpus_do(monkeypatch):
    """Until the test ends."""
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source.name, target.name) != ("fp32", "bf16"):
            return theirs(data, source, target, rounding)
        rounded = torch.from_numpy(numpy.array(data)).bfloat16().view(torch.int16)
        return rounded.numpy().view(numpy.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
