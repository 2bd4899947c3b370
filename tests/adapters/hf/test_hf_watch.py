"""Whether weights have changed: told of every dtype, with one wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paged_hf.model.watch import WatchedModules

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
    watch = WatchedModules(model.modules())
    assert not watch.changed()
    getattr(model, f"b{place}").data.copy_(torch.ones(1000))
    assert watch.changed()
    assert not watch.changed()


def test_weights_that_hold_nan_have_not_changed_for_that() -> None:
    model = nn.Linear(3, 3)
    model.weight.data[1] = float("nan")
    assert not WatchedModules(model.modules()).changed()


def test_the_device_is_waited_for_once_however_many_dtypes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, waits = WatchedModules([of_all_dtypes()]), []
    for owner, name in ((torch.Tensor, "__bool__"), (torch.Tensor, "item"), (torch.Tensor, "tolist"), (torch, "equal")):
        original = getattr(owner, name)

        def counted(*args: Any, _original: Any = original, _name: str = name) -> Any:
            waits.append(_name)
            return _original(*args)

        monkeypatch.setattr(owner, name, counted)
    assert not watch.changed()
    assert len(waits) == 1, waits


def columns_first(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(columns, rows).t()


def part_of_a_wider_one(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows, columns + 3)[:, :columns]


@pytest.mark.parametrize("make", [torch.zeros, columns_first, part_of_a_wider_one])
@pytest.mark.parametrize("shape", [(64, 64), (300, 48), (48, 300), (97, 90), (1, 77), (77, 1), (2, 40), (40, 2)])
def test_every_row_and_every_column_that_is_written_through_data_is_told(make: Any, shape: tuple[int, int]) -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(make(*shape))
    watch, weight = WatchedModules([layer]), layer.weight.data
    for line in (*weight.unbind(0), *weight.unbind(1)):
        line += 1
        assert watch.changed()
    assert not watch.changed()


def test_every_row_and_column_of_each_expert_is_told() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(3, 20, 48))
    watch = WatchedModules(model.modules())
    for expert in model.experts.data:
        for line in (*expert.unbind(0), *expert.unbind(1)):
            line += 1
            assert watch.changed()


def test_every_value_of_a_vector_is_told() -> None:
    norm = nn.LayerNorm(500)
    watch = WatchedModules([norm])
    for place in range(500):
        norm.bias.data[place] = -1
        assert watch.changed()


def test_a_model_without_weights_never_changes() -> None:
    assert not WatchedModules([nn.Module()]).changed()
