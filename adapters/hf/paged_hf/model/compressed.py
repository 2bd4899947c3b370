"""Models as compressed-tensors leaves them.

Weights are widened when the model is first called, by a hook on it. From then on, each module keeps its tensors in a
mapping that may move them between devices, and has a forward on the instance that moves its inputs; the forward of a
quantised layer also rounds rows, if its scheme says so. This file knows what the library adds to torch modules (0.20),
and does not import it.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

_LIBRARY = "compressed_tensors."
_WIDENS = "ct_decompress_hook"  # the handle of a hook on the model
_MOVES = "_original_forward_func"  # what the forward calls that moves inputs


def widen(model: nn.Module) -> None:
    """Do what the model's first call would do. If a twin were called first, it would remove the hook, and the user's
    own model would stay packed without it."""
    handle = getattr(model, _WIDENS, None)
    hook = None if handle is None else model._forward_pre_hooks.get(handle.id)
    if hook is not None:
        hook(model, ())


def is_librarys(forward: Any) -> bool:
    """Whether it is a forward that the library puts on modules, which treats each row by itself."""
    function = getattr(forward, "__func__", forward)
    return str(getattr(function, "__globals__", {}).get("__name__", "")).startswith(_LIBRARY)


def leave_to_class(twin: nn.Module) -> None:
    """Give a twin of such a module plain dictionaries of tensors and its class's forward, which faster forwards expect,
    if the library's own forward adds nothing on a CPU."""
    own = twin.__dict__
    if not is_librarys(own.get("forward")):
        return
    kept = [own["_parameters"], own["_buffers"]]
    if _MOVES in own:
        if not all(_stays_on_cpu(each) for each in kept):
            return
        own["_parameters"], own["_buffers"] = (getattr(each, "offloaded_values", each) for each in kept)
        own["forward"] = types.MethodType(own.pop(_MOVES), twin)
    function = own["forward"].__func__
    if function is type(twin).forward:
        del own["forward"]
    elif type(twin) is nn.Linear and is_librarys(function):
        del own["forward"]
        if _rounds_rows(twin):
            own["rounding_forward"] = function
            twin.__class__ = RoundingLinear


def _stays_on_cpu(kept: Any) -> bool:
    devices = [getattr(kept, name, "cpu") for name in ("onload_device", "offload_device")]
    return all(device != "disk" and torch.device(device).type == "cpu" for device in devices)


def _rounds_rows(module: nn.Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return any(getattr(scheme, name, None) is not None for name in ("input_activations", "output_activations"))


class RoundingLinear(nn.Linear):
    """The library's forward calls the forward of its layer's class, so it gets a layer of the class that it knows."""

    def forward(self, x: Any) -> Any:
        plain = object.__new__(nn.Linear)
        object.__setattr__(plain, "__dict__", self.__dict__)
        return self.__dict__["rounding_forward"](plain, x)
