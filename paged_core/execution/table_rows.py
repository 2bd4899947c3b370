"""TableRows: block tables as rows of one tensor, kept from step to step on the device where attention reads it.

The scheduler decides which blocks a request has. Here each request's table has a row, and only entries that the row
lacks are written. They are sent to a device with the step's other integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paged_core.scheduling.request import Request


class TableRows:
    """The rows. In each step, call ``row`` for each request, then ``news``, then ``gather``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.in_numpy = device.type == "cpu"  # numpy: for a few rows, it isn't worth waking torch's thread pool
        self._tables = _zeros(0, 0, device)  # int32 [rows, columns]
        self._rows: dict[Request, _Row] = {}
        self._spare: list[int] = []
        self._news: list[tuple[int, int, list[int]]] = []  # (row, first column, blocks) not written yet

    def row(self, request: Request) -> int:
        """Return the row that will hold this request's block table once its news are written."""
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
        """Return ``(places, blocks)``, the entries that rows of this step still lack, for ``gather`` on the device."""
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
        """Write ``blocks i32 [U]`` at ``places i64 [U]``, then read ``rows i32 [R]`` -> ``i32 [R, num_columns]``."""
        if self.in_numpy:
            table: Any = self._tables.numpy()
            table.reshape(-1)[places.numpy()] = blocks.numpy()
            return torch.from_numpy(table[rows.numpy(), :num_columns])
        if len(places):
            self._tables.view(-1).scatter_(0, places, blocks)
        return self._tables[:, :num_columns].index_select(0, rows)

    def forget(self) -> None:
        """Forget all entries, so that each row is written anew when it is needed."""
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
        self.length = 0  # entries that are written, or in the news


@torch.inference_mode(False)  # tensors made in inference mode could not be written outside it
def _zeros(num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    return torch.zeros(num_rows, num_columns, dtype=torch.int32, device=device)
