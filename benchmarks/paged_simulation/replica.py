"""One replica in simulated time: a real Scheduler on a real BlockPool, and a cost model for what they schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paged_core import BlockPool, BlockRemoved, BlockStored, Request, SamplingParams, Selection
from paged_core.scheduling.policies import Fcfs
from paged_core.scheduling.schedule import Limits, Schedule
from paged_core.scheduling.scheduler import Scheduler
from paged_ray.placement import Report
from paged_simulation.costs import Costs, StepSize
from paged_simulation.histogram import Histogram

_TOKEN = 7  # that every row is given: nothing depends on it
_LOOK = 64  # steps between two looks at the memory


@dataclass(frozen=True)
class Sizes:
    """Of one replica's engine."""

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 8192
    watermark: float = 0.01
    enable_prefix_caching: bool = True

    def limits(self) -> Limits:
        """As an Engine makes them."""
        return Limits(
            self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len,
            int(self.watermark * self.num_blocks), 256, None, self.enable_prefix_caching,
        )  # fmt: skip


class Record:
    """What was seen, of all replicas together."""

    def __init__(self) -> None:
        self.first_token, self.between_tokens, self.whole = Histogram(), Histogram(), Histogram()
        self.num_output_tokens = self.num_prompt_tokens = self.num_finished = 0
        self.num_looks = 0
        self.usage = self.waste = 0.0


class Replica:
    """Answers requests in steps: ``begin`` tells how long the next one takes, ``end`` is called when it is over."""

    def __init__(self, sizes: Sizes, costs: Costs, key: bytes, record: Record, *, tells: bool = False) -> None:
        self.pool = BlockPool(sizes.num_blocks, sizes.block_size, key=key)
        self.scheduler = Scheduler(self.pool, Fcfs(), sizes.limits())
        self.busy = False
        self.num_open = 0
        self.busy_s = 0.0
        self.num_steps = 0
        self.begun: Sequence[Request] = ()  # whose first token the last step has brought
        self._costs, self._record = costs, record
        self._arrived: dict[Request, float] = {}
        self._last_token: dict[Request, float] = {}  # of rows that were preempted since
        self._schedule: Schedule | None = None
        self._firsts: list[Request] = []  # whose prompt's end the step computes
        self._num_samples = 0
        self._last_end = 0.0
        self._changes: dict[bytes, bool] = {}
        self._num_changes = 0
        if tells:
            self.pool.watch()

    def submit(self, request: Request, now: float) -> None:
        """Raises InvalidRequestError if it can never fit."""
        self.scheduler.add([request])
        self._arrived[request] = now
        self.num_open += 1

    def begin(self, now: float) -> float:
        """Seconds of the step that begins now; 0: there is nothing to do."""
        if not self._arrived:
            return 0.0
        schedule = self.scheduler.schedule()
        for request in schedule.preempted:
            self._last_token[request] = self._last_end
        num_tokens = num_context = num_samples = 0
        firsts = []
        for request, start, num, samples in schedule.chunks:
            num_tokens += num
            num_context += start + num
            if samples:
                num_samples += 1
                if num > 1 or start < request.num_prompt:
                    firsts.append(request)
        self._schedule, self._firsts, self._num_samples = schedule, firsts, num_samples
        self.busy = True
        took = self._costs.step_s(StepSize(num_tokens, num_samples, num_context))
        self.busy_s += took
        return took

    def end(self, now: float) -> Sequence[Request]:
        """Takes the step's tokens in. Returns who has ended."""
        schedule, record = self._schedule, self._record
        assert schedule is not None
        num_on = self._num_samples - len(self._firsts)
        if num_on:
            record.between_tokens.add(now - self._last_end, num_on)
        for request in self._firsts:
            if request.num_output:  # it goes on after it was preempted
                record.between_tokens.add(now - self._last_token.pop(request, self._last_end))
            else:
                record.first_token.add(now - self._arrived[request])
        outputs = self.scheduler.update(schedule, Selection([_TOKEN] * self._num_samples))
        self.begun = self._firsts
        self._last_end, self._schedule, self.busy = now, None, False
        record.num_output_tokens += self._num_samples
        self.num_steps += 1
        if self.num_steps % _LOOK == 0:
            self._look()
        return [self._ended(output.request, now) for output in outputs if output.finish_reason is not None]

    def report(self) -> Report:
        """What has changed in the prefix cache since this was asked."""
        for event in self.pool.take_events():
            if isinstance(event, BlockStored):
                self._changes[event.digest] = True
            elif isinstance(event, BlockRemoved):
                self._changes[event.digest] = False
        changes, self._changes = self._changes, {}
        self._num_changes += len(changes)
        stored = [routed(digest) for digest, came in changes.items() if came]
        removed = [routed(digest) for digest, came in changes.items() if not came]
        return Report(self._num_changes, stored, removed)

    def _ended(self, request: Request, now: float) -> Request:
        self._record.whole.add(now - self._arrived.pop(request))
        self._record.num_finished += 1
        self._record.num_prompt_tokens += request.num_prompt
        request.group.members.clear()  # a circle, which would keep it until Python looks for circles
        self.num_open -= 1
        return request

    def _look(self) -> None:
        """As StepStats does, seldom: how full the memory is, and how much of what is taken holds no token."""
        pool, size = self.pool, self.pool.block_size
        wasted = sum(len(request.block_table) * size - request.num_computed for request in self.scheduler.running)
        self._record.num_looks += 1
        self._record.usage += pool.num_used / pool.num_blocks
        self._record.waste += wasted / (pool.num_used * size) if pool.num_used else 0.0


def routed(digest: bytes) -> int:
    """A block's digest as a router is told of it."""
    return int.from_bytes(digest[:8], "big")


_PARAMS: dict[int, SamplingParams] = {}


def new_request(number: int, prompt: list[int], num_output: int) -> Request:
    """A greedy request for so many tokens."""
    params = _PARAMS.get(num_output)
    if params is None:
        params = _PARAMS[num_output] = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    return Request(str(number), prompt, params)
