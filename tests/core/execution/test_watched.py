"""Whether tensors have changed: those who packed or cached something of them hear of it."""

from __future__ import annotations

import pytest
import torch

from paged_core import WatchedTensors


def test_what_every_call_can_see_is_a_tensor_replaced_and_one_written_in_place():
    weight = torch.zeros(3, 4)
    watched = WatchedTensors([weight, None])
    assert watched.same([weight, None]) and not watched.same([weight, torch.zeros(4)])
    assert not watched.same([weight.clone(), None]) and not watched.same([None, None])
    weight += 1
    assert not watched.same([weight, None])


def test_memory_that_was_exchanged_under_a_tensor_is_noticed_when_asked():
    weight = torch.zeros(3, 4)
    watched = WatchedTensors([weight])
    other = torch.zeros(3, 4)
    weight.data = other
    assert watched.same([weight]) and not watched.untouched([weight]) and watched.stale([weight])


def test_tensors_of_inference_mode_have_no_versions_and_are_watched_all_the_same():
    with torch.inference_mode():
        weight = torch.zeros(3, 4)
    watched = WatchedTensors([torch.zeros(2), weight])
    assert not watched.same([torch.zeros(2), weight])
    alone = WatchedTensors([weight])
    assert not alone.stale([weight])
    with torch.inference_mode():
        weight[1] = 5
    assert alone.same([weight]) and alone.stale([weight])


@pytest.mark.parametrize("rows, columns", [(60, 96), (96, 60), (64, 64), (97, 48), (1, 30), (30, 1), (2, 9)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("spare", [0, 3])
def test_a_row_or_column_that_was_written_through_data_is_noticed_when_asked(rows, columns, turned, spare):
    weight = torch.zeros(columns, rows + spare)[:, :rows].t() if turned else torch.zeros(rows, columns + spare)
    weight = weight[:, :columns]
    for line in (*weight.data.unbind(0), *weight.data.unbind(1)):
        watch = WatchedTensors([weight, None])
        assert not watch.stale([weight, None])
        line += 1
        assert watch.stale([weight, None])


def test_every_value_of_a_bias_is_looked_at():
    bias = torch.zeros(300)
    for place in range(300):
        watch = WatchedTensors([bias])
        bias.data[place] = 1
        assert watch.stale([bias])
