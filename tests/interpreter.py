"""Where tests of Triton's kernels run: on a GPU, or on the CPU in Triton's interpreter. The interpreter is changed for
the tests. By itself it truncates float32 to bfloat16, where every GPU rounds, and it looks through all of Triton's
names each time that a kernel calls a function."""

from __future__ import annotations

import inspect
from typing import Any

import numpy
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")


def round_as_gpus_do(monkeypatch):
    """Make the interpreter round until the test ends. A GPU does so itself."""
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


def replace_builtins_once() -> None:
    """Replace Triton's functions by the interpreter's for good; by itself it does that for as long as a kernel runs."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    known: dict[Any, list[tuple[str, Any]]] = {}

    def replace(package: Any, builder: Any, scope: Any) -> None:
        if package not in known:
            known[package] = [(name, each) for name, each in inspect.getmembers(package) if is_builtin(each)]
        for name, builtin in known[package]:
            if getattr(package, name) is not builtin:
                return  # a running kernel has replaced them
            interpreter._patch_attr(package, name, builtin, builder, scope)

    interpreter._patch_builtin = replace


if not ON_GPU:
    replace_builtins_once()
