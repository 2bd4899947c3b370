"""One replica in simulated time: a real Scheduler on a real BlockPool, and a cost model for the scheduled steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paged_core import BlockPool, BlockRemoved, BlockStored, Request, RequestOutput, SamplingParams, Selection
from paged_core.scheduling.policies import Fcfs
from paged_core.scheduling.schedule import Limits, Schedule
from paged_core.scheduling.scheduler import Scheduler
from paged_core.scheduling.stretches import Stretch
from paged_ray.placement import CacheChanges
from paged_simulation.costs import CostModel, StepSize
from paged_simulation.histogram import Histogram

_TOKEN = 7  # that every row gets; nothing depends on it
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
    """Measurements over all replicas."""

    def __init__(self) -> None:
        self.first_token, self.between_tokens, self.whole = Histogram(), Histogram(), Histogram()
        self.num_output_tokens = self.num_prompt_tokens = self.num_finished = 0
        self.num_looks = 0
        self.usage = self.waste = 0.0


class SimulatedReplica:
    """Answers requests in steps: ``begin`` returns the end of the next steps, and ``end`` is called then. Several steps
    are taken at once if the scheduler can predict them, and fewer if a request arrives meanwhile.

    Args:
        tells_s: seconds between two reports of what is cached; None: no reports.
        leaps: whether to take predictable steps at once. The results are the same.
    """

    def __init__(
        self,
        sizes: Sizes,
        costs: CostModel,
        key: bytes,
        record: Record,
        *,
        tells_s: float | None = None,
        leaps: bool = True,
    ) -> None:
        self.pool = BlockPool(sizes.num_blocks, sizes.block_size, key=key)
        self.scheduler = Scheduler(self.pool, Fcfs(), sizes.limits())
        self.ends_at: float | None = None  # end of the current steps; None: it is idle
        self.num_open = 0
        self.busy_s = 0.0
        self.num_steps = 0
        self.begun: Sequence[Request] = ()  # requests that got their first token in the last steps
        self._costs, self._record = costs, record
        self._tells_s, self._told_at, self._leaps = tells_s, 0.0, leaps
        self._arrived: dict[Request, float] = {}
        self._last_token: dict[Request, float] = {}  # of rows that were preempted since
        self._under_way: Schedule | Stretch | None = None
        self._ends: list[float] = []  # of each step under way
        self._began = 0.0
        self._firsts: list[Request] = []  # requests without a token in the previous step
        self._num_samples = 0
        self._changes: dict[bytes, bool] = {}
        self._num_changes = 0
        if tells_s is not None:
            self.pool.watch()

    def submit(self, request: Request, now: float) -> None:
        """The request is scheduled when the current step is over.

        Raises:
            InvalidRequestError: it can never fit.
        """
        self.scheduler.add([request])
        self._arrived[request] = now
        self.num_open += 1
        if self.ends_at is not None:
            del self._ends[bisect_right(self._ends, now) + 1 :]
            self.ends_at = self._ends[-1]

    def begin(self, now: float) -> None:
        """Begin the next steps, if there is work."""
        self._began, self._under_way, self.ends_at = now, None, None
        if not self._arrived:
            return
        stretch = self.scheduler.stretch(_LOOK - self.num_steps % _LOOK) if self._leaps else None
        if stretch is not None:
            self._under_way, self._ends = stretch, list(self._foretold(stretch, now))
        else:
            self._under_way = schedule = self.scheduler.schedule()
            self._ends = [now + self._seconds(schedule)]
        self.ends_at = self._ends[-1]

    def end(self) -> Sequence[Request]:
        """Take in the tokens of the steps. Returns the requests that ended."""
        steps, now = self._under_way, self._ends[-1]
        assert steps is not None
        outputs = self._leap(steps) if isinstance(steps, Stretch) else self._update(steps, now)
        self.busy_s += now - self._began
        if self.num_steps % _LOOK == 0:
            self._look()
        return [self._ended(output.request, now) for output in outputs if output.finish_reason is not None]

    def report(self, now: float) -> CacheChanges | None:
        """Changes of the prefix cache since the last report, if a report is due."""
        if not self._is_to_tell(now):
            return None
        self._told_at = now
        for event in self.pool.take_events():
            if isinstance(event, BlockStored):
                self._changes[event.digest] = True
            elif isinstance(event, BlockRemoved):
                self._changes[event.digest] = False
        changes, self._changes = self._changes, {}
        self._num_changes += len(changes)
        stored = [digest for digest, came in changes.items() if came]
        removed = [digest for digest, came in changes.items() if not came]
        return CacheChanges(self._num_changes, stored, removed)

    # ---- a step that was scheduled -----------------------------------------------------------------------------------

    def _seconds(self, schedule: Schedule) -> float:
        """That it takes."""
        for request in schedule.preempted:
            if request.num_output:
                self._last_token[request] = self._began  # the end of the previous step
        num_tokens = num_context = num_samples = 0
        firsts = []
        for request, start, num, samples in schedule.chunks:
            num_tokens += num
            num_context += start + num
            if samples:
                num_samples += 1
                if start < request.num_prompt or request in self._last_token:
                    firsts.append(request)
        self._firsts, self._num_samples = firsts, num_samples
        return self._costs.step_s(StepSize(num_tokens, num_samples, num_context))

    def _update(self, schedule: Schedule, now: float) -> Sequence[RequestOutput]:
        record = self._record
        num_on = self._num_samples - len(self._firsts)
        if num_on:
            record.between_tokens.add(now - self._began, num_on)
        for request in self._firsts:
            if request.num_output:  # it continues after a preemption
                record.between_tokens.add(now - self._last_token.pop(request))
            else:
                record.first_token.add(now - self._arrived[request])
        record.num_output_tokens += self._num_samples
        self.begun = self._firsts
        self.num_steps += 1
        return self.scheduler.update(schedule, Selection([_TOKEN] * self._num_samples))

    # ---- steps that were foretold ------------------------------------------------------------------------------------

    def _foretold(self, stretch: Stretch, now: float) -> Iterator[float]:
        """The end of each predictable step, until an event."""
        num_rows, num_context = len(stretch.requests), stretch.num_context
        for _ in range(stretch.num_steps):
            now += self._costs.step_s(StepSize(num_rows, num_rows, num_context))
            num_context += num_rows
            yield now
            if self._is_to_tell(now):
                return

    def _leap(self, stretch: Stretch) -> Sequence[RequestOutput]:
        num_rows, before = len(stretch.requests), self._began
        for at in self._ends:
            self._record.between_tokens.add(at - before, num_rows)
            before = at
        self._record.num_output_tokens += num_rows * len(self._ends)
        self.begun = ()
        self.num_steps += len(self._ends)
        return self.scheduler.leap(stretch, len(self._ends), _TOKEN)

    # ---- both --------------------------------------------------------------------------------------------------------

    def _is_to_tell(self, now: float) -> bool:
        return self._tells_s is not None and now - self._told_at >= self._tells_s

    def _ended(self, request: Request, now: float) -> Request:
        self._record.whole.add(now - self._arrived.pop(request))
        self._record.num_finished += 1
        self._record.num_prompt_tokens += request.num_prompt
        request.group.members.clear()  # breaks a reference cycle, which would keep it until the next garbage collection
        self.num_open -= 1
        return request

    def _look(self) -> None:
        """Record, like StepStats but seldom, the use of the memory, and the share of used slots without a token."""
        pool, size = self.pool, self.pool.block_size
        wasted = sum(len(request.block_table) * size - request.num_computed for request in self.scheduler.running)
        self._record.num_looks += 1
        self._record.usage += pool.num_used / pool.num_blocks
        self._record.waste += wasted / (pool.num_used * size) if pool.num_used else 0.0


_PARAMS: dict[int, SamplingParams] = {}


def new_request(number: int, prompt: list[int], num_output: int) -> Request:
    """A greedy request for so many tokens."""
    params = _PARAMS.get(num_output)
    if params is None:
        params = _PARAMS[num_output] = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    return Request(str(number), prompt, params)
