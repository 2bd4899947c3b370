"""Whether weights have changed: told of every dtype, with one wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_hf.watch import Watch
from torch import nn

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
]  # fmt: skip


def of_all_dtypes() -> nn.Module:
    model = nn.Module()
    for i, dtype in enumerate(DTYPES):
        model.register_buffer(f"b{i}", torch.zeros(1000).to(dtype))
    return model


@pytest.mark.parametrize("place", range(len(DTYPES)), ids=lambda place: str(DTYPES[place]))
def test_an_edit_through_data_is_told_once_whatever_the_dtype(place: int) -> None:
    model = of_all_dtypes()
    watch = Watch(model)
    assert not watch.changed()
    getattr(model, f"b{place}").data.copy_(torch.ones(1000))
    assert watch.changed()
    assert not watch.changed()


def test_weights_that_hold_nan_have_not_changed_for_that() -> None:
    model = nn.Linear(3, 3)
    model.weight.data[1] = float("nan")
    assert not Watch(model).changed()


def test_the_device_is_waited_for_once_however_many_dtypes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, waits = Watch(of_all_dtypes()), []
    for owner, name in ((torch.Tensor, "__bool__"), (torch.Tensor, "item"), (torch.Tensor, "tolist"), (torch, "equal")):
        original = getattr(owner, name)

        def counted(*args: Any, _original: Any = original, _name: str = name) -> Any:
            waits.append(_name)
            return _original(*args)

        monkeypatch.setattr(owner, name, counted)
    assert not watch.changed()
    assert len(waits) == 1, waits


def test_a_model_without_weights_never_changes() -> None:
    assert not Watch(nn.Module()).changed()
