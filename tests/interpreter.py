"""Where tests of Triton's kernels run: on a GPU, or else on the CPU through Triton's interpreter, as it has to be for
tests: by itself it cuts float32 off to bfloat16 where every GPU rounds."""

from __future__ import annotations

import numpy
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")


def round_as_gpus_do(monkeypatch):
    """Until the test ends. A GPU does so itself."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source.name, target.name) != ("fp32", "bf16"):
            return theirs(data, source, target, rounding)
        rounded = torch.from_numpy(numpy.array(data)).bfloat16().view(torch.int16)
        return rounded.numpy().view(numpy.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
