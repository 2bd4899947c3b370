"""Decode steps as CUDA graphs: the launches of one step are recorded, and replayed for every step of the same shape.

A graph reads and writes fixed memory. So each graph is captured for a number of rows and a longest sequence, over
static inputs. A step is copied into the inputs of the smallest graph that it fits into. The other rows are padding:
token 0 at position 0, no keys, and K/V that go to the null block. This file knows batches. It knows neither models nor
kernels.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from paged_core.execution.batch import AttentionMetadata, Batch
from paged_core.execution.waits import NoWaits

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs some work on the device and captures it. The function that it returns repeats the work on the same memory.
Raises torch.AcceleratorError if the device has failed, torch.OutOfMemoryError, or another error if the work can't be
captured."""
Forward = Callable[[Batch], Tensor]

_log = logging.getLogger("paged_core")


class DecodeGraphs:
    """The graphs of one model on one cache.

    Args:
        max_rows: rows of the largest step.
        max_seq_len: tokens of the longest sequence.
        block_size: slots in a block.
        device: the device of the model's inputs.
        recorder: makes a Record; graphs of one Record share memory.
    """

    def __init__(
        self, max_rows: int, max_seq_len: int, block_size: int, device: torch.device, recorder: Callable[[], Record]
    ) -> None:
        self.num_captures = 0
        self._sizes = row_classes(max_rows)
        self._lengths = length_classes(max_seq_len)
        self._recorder = recorder
        self._record: Record | None = recorder()  # None: the model can't be captured
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}  # (rows, longest sequence) -> its graph
        self._no_room: set[tuple[int, int]] = set()  # graphs that memory had no room for
        rows = self._sizes[-1]
        self._inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._ids, self._positions, self._slots = self._inputs.unbind()
        self._seq_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._indices = torch.arange(rows, device=device)
        self._tables = {
            length: torch.zeros(rows, -(-length // block_size), dtype=torch.int32, device=device)
            for length in self._lengths
        }
        self._logits: Tensor | None = None  # [rows, vocab], of the graph that ran last
        self._num_filled = 0  # rows of the inputs from here on are padding

    @property
    def captured(self) -> frozenset[tuple[int, int]]:
        """The (rows, longest sequence) of each captured graph."""
        return frozenset(self._replays)

    def warm_up(
        self, forward: Forward, replayable: Callable[[], bool], progress: Callable[[str, int, int], None]
    ) -> None:
        """Capture all graphs, the largest first, so that the others fit into its memory."""
        keys = [(size, length) for size in reversed(self._sizes) for length in reversed(self._lengths)]
        self._pad(0)
        for done, key in enumerate(keys):
            progress("capturing decode steps", done, len(keys))
            self._capture(key, forward, replayable)
        progress("capturing decode steps", len(keys), len(keys))

    def run(self, batch: Batch, forward: Forward, replayable: Callable[[], bool]) -> Tensor | None:
        """Return the logits ``[S, vocab]`` of a decode batch, which the next run overwrites, or None if there is no
        graph for it. ``replayable``: whether ``forward`` may be captured now. Graphs that were captured before are
        replayed in any case."""
        num = len(batch.sample_requests)
        key = self._captured(num, batch.attention.max_seq_len, forward, replayable)
        if key is None or self._logits is None:
            return None
        self._fill(batch, num, self._tables[key[1]])
        self._replays[key]()
        return self._logits[:num]

    def drop(self) -> None:
        """Forget all graphs, because weights, modules or the cache have moved. They are captured anew when they are
        needed."""
        if self._record is not None:
            self._replays.clear()
            self._no_room.clear()
            self._logits = None  # the output layer may have another dtype now
            self._record = self._recorder()

    def _captured(
        self, num: int, longest: int, forward: Forward, replayable: Callable[[], bool]
    ) -> tuple[int, int] | None:
        """Return the smallest graph that a step of this shape fits into, and capture it if need be. If it can't be
        captured now, return a larger one."""
        sizes = self._sizes[bisect_left(self._sizes, num) :]
        lengths = self._lengths[bisect_left(self._lengths, longest) :]
        key = sizes[0], lengths[0]
        if key not in self._replays and key not in self._no_room:
            self._pad(0)
            self._capture(key, forward, replayable)
        there = ((size, length) for length in lengths for size in sizes)
        return next((key for key in there if key in self._replays), None)

    def _capture(self, key: tuple[int, int], forward: Forward, replayable: Callable[[], bool]) -> None:
        if self._record is None or not replayable():
            return
        static = self._static(*key)

        def work() -> None:
            logits = forward(static)
            if self._logits is None:
                self._logits = logits.new_empty(len(self._indices), logits.shape[1])
            # All graphs share this memory; otherwise each would keep its own logits.
            self._logits[: len(logits)].copy_(logits)

        try:
            self._replays[key] = self._record(work)
            self.num_captures += 1
        except torch.AcceleratorError:
            raise
        except torch.OutOfMemoryError:
            if not self._no_room:
                _log.warning("no memory for more CUDA graphs: some decode steps run without, or through a larger one")
            self._no_room.add(key)
        except Exception as error:  # such as a forward that waits for the device
            if not replayable():  # that has changed since it was asked above
                return
            _log.warning("decode steps run without CUDA graphs, for this model can't be captured: %s", error)
            self._record = None
            self._replays.clear()

    def _static(self, size: int, length: int) -> Batch:
        tables, slots = self._tables[length][:size], self._slots[:size]
        attention = AttentionMetadata(self._starts[: size + 1], self._seq_lens[:size], tables, slots, 1, length)
        return Batch(self._ids[:size], self._positions[:size], attention, self._indices[:size], (), (), (), True)

    def _fill(self, batch: Batch, num: int, tables: Tensor) -> None:
        """Copy a batch into the static inputs, in three launches if the last step had as many rows."""
        self._pad(num)
        meta = batch.attention
        inputs = [part[:num] for part in (self._ids, self._positions, self._slots)]
        torch._foreach_copy_(inputs, [batch.token_ids, batch.positions, meta.slot_mapping])
        self._seq_lens[:num].copy_(meta.seq_lens)
        tables[:num, : meta.block_tables.shape[1]].copy_(meta.block_tables)

    def _pad(self, num: int) -> None:
        """Make all rows from ``num`` on padding. Otherwise they would overwrite K/V that earlier steps have stored."""
        if num < self._num_filled:
            self._inputs[:, num : self._num_filled].zero_()
            self._seq_lens[num : self._num_filled].zero_()
        self._num_filled = num


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _capture_stream(device)
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with _one_at_a_time, torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            try:
                with torch.cuda.stream(self._stream):  # entered first, so that a failed capture still leaves the stream
                    self._run(work, graph)
            except torch.AcceleratorError as error:
                torch.cuda.synchronize()  # raises again if the device has failed for good
                no_room = "out of memory" in str(error)  # the graph's own memory, which torch does not allocate
                raise (torch.OutOfMemoryError if no_room else RuntimeError)(str(error)) from error
            finally:
                before.wait_stream(self._stream)
        return graph.replay

    def _run(self, work: Callable[[], None], graph: torch.cuda.CUDAGraph) -> None:
        # This run makes what is made once (workspaces, compiled kernels), and finds work that can't be captured. A
        # capture that fails would leave torch's allocator and random numbers in capture mode.
        with NoWaits(self._device.type):
            work()
        # Other threads of this process may use the device meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            work()


_one_at_a_time = Lock()  # torch allows only one capture at a time in a process, also with several engines


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for all captures on a device, because cuBLAS keeps a workspace for each stream for good."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def row_classes(most: int) -> list[int]:
    """Return 1, 2, 4, 8, 16, 24, ... up to ``most``: at most a quarter of a large step is padding."""
    sizes, size = [], 1
    while size < most:
        sizes.append(size)
        size = 2 * size if size < 8 else size + max(8, 1 << (size.bit_length() - 3))
    return [*sizes, most]


def length_classes(most: int) -> list[int]:
    """Return 1,024, 4,096, ... up to ``most``. A launch's grid covers the longest sequence, and empty programs take
    time too."""
    lengths, length = [], 1024
    while length < most:
        lengths.append(length)
        length *= 4
    return [*lengths, most]
