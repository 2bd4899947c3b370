"""TableRows: block tables as rows of one tensor that lives where attention reads it, from step to step.

Which blocks a request has is the scheduler's; here each request's table has a row, and only what the row lacks is
written. On a device those few entries travel with the step's other integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paged_core.scheduling.request import Request


class TableRows:
    """``rows``, then ``news``, then ``gather``: once a step each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in_numpy = device.type == "cpu"  # a few rows are no work to wake a pool of threads for
        self._tables = _zeros(0, 0, device)  # int32 [rows, columns]
        self._rows: dict[Request, _Row] = {}
        self._spare: list[int] = []
        self._news: list[tuple[int, int, list[int]]] = []  # (row, first column, blocks) not written yet

    def row(self, request: Request) -> int:
        """The row that will hold this request's block table once its news are written."""
        row = self._rows.get(request)
        table = request.block_table
        if row is None:
            row = self._rows[request] = _Row(self._take_row())
        if row.version != table.version:
            row.version, row.length = table.version, 0
        if row.length < len(table):
            self._news.append((row.index, row.length, table[row.length :]))
            row.length = len(table)
        return row.index

    def news(self) -> tuple[list[int], list[int]]:
        """``(places, blocks)`` that ``gather`` needs on the device: what the rows that were asked for still lack."""
        longest = max((first + len(blocks) for _, first, blocks in self._news), default=0)
        num_rows, num_columns = self._tables.shape
        if longest > num_columns:
            self._grow(num_rows, max(2 * num_columns, longest, 16))
        places: list[int] = []
        values: list[int] = []
        for row, first, blocks in self._news:
            place = row * self._tables.shape[1] + first
            places += range(place, place + len(blocks))
            values += blocks
        self._news = []
        return places, values

    def gather(self, places: Tensor, blocks: Tensor, rows: Tensor, num_columns: int) -> Tensor:
        """Write ``blocks i32 [U]`` at ``places i64 [U]``, read ``rows i32 [R]`` -> ``i32 [R, num_columns]``."""
        if self._in_numpy:
            table: Any = self._tables.numpy()
            table.reshape(-1)[places.numpy()] = blocks.numpy()
            return torch.from_numpy(table[rows.numpy(), :num_columns])
        if len(places):
            self._tables.view(-1).scatter_(0, places, blocks)
        return self._tables[:, :num_columns].index_select(0, rows)

    def forget(self) -> None:
        """Have every row written anew when it is asked for."""
        self._rows.clear()
        self._news = []
        self._spare = list(range(self._tables.shape[0]))

    def _take_row(self) -> int:
        if not self._spare:
            gone = [request for request in self._rows if not request.block_table]
            self._spare = [self._rows.pop(request).index for request in gone]
        if not self._spare:
            num_rows, num_columns = self._tables.shape
            self._grow(max(2 * num_rows, 16), num_columns)
            self._spare = list(range(num_rows, self._tables.shape[0]))
        return self._spare.pop()

    def _grow(self, num_rows: int, num_columns: int) -> None:
        old = self._tables
        self._tables = _zeros(num_rows, num_columns, self._device)
        self._tables[: old.shape[0], : old.shape[1]] = old


class _Row:
    __slots__ = ("index", "length", "version")

    def __init__(self, index: int) -> None:
        self.index = index
        self.version = -1
        self.length = 0  # entries that are written, or among the news


@torch.inference_mode(False)  # what is made in it can't be written outside
def _zeros(num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    return torch.zeros(num_rows, num_columns, dtype=torch.int32, device=device)
