"""Small schedulers, requests for them, and steps that always sample something."""

from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.policies import Fcfs
from paged_core.scheduling.request import Group, Request, Selection
from paged_core.scheduling.schedule import Limits, Schedule
from paged_core.scheduling.scheduler import Scheduler

BLOCK = 4


def make(num_blocks=64, *, seqs=8, budget=32, max_len=200, watermark=0, window=None, policy=None, caching=True):
    limits = Limits(seqs, budget, max_len, watermark, 8, window, caching)
    return Scheduler(BlockPool(num_blocks, BLOCK), policy or Fcfs(), limits)


def add(scheduler, id, prompt, *, max_tokens=5, lockstep=False, rows=1, **params):
    """Queue ``rows`` samples of a prompt (token ids, or a length)."""
    if isinstance(prompt, int):
        prompt = [hash((id, i)) % 1000 for i in range(prompt)]
    group = Group(lockstep)
    p = SamplingParams(max_tokens=max_tokens, **params)
    for index in range(rows):
        Request(id, prompt, p, index=index, group=group)
    scheduler.add(group.members)
    return group.members[0] if rows == 1 else group.members


def step(scheduler, **selection):
    """Run one step in which row i samples token 1000 + i."""
    schedule = scheduler.schedule()
    num_rows = sum(len(chunk.samples) for chunk in schedule.chunks)
    outputs = scheduler.update(schedule, Selection([1000 + i for i in range(num_rows)], **selection))
    scheduler.check()
    return schedule, outputs


def work_of(schedule: Schedule) -> dict[str, int]:
    work: dict[str, int] = {}
    for chunk in schedule.chunks:
        work[chunk.request.id] = work.get(chunk.request.id, 0) + chunk.num_tokens
    return work


def run_to_end(scheduler, max_steps=2000):
    final = []
    for _ in range(max_steps):
        if not scheduler.has_work:
            return final
        schedule, outputs = step(scheduler)
        assert schedule.chunks, "a step with work to do computed nothing"
        final += [output for output in outputs if output.finish_reason is not None]
    raise AssertionError("requests never ended")


def add_rows(scheduler, id, lengths, max_tokens=6):
    group = Group(lockstep=True)
    for index, length in enumerate(lengths):
        prompt = [index * 100 + i for i in range(length)]
        Request(id, prompt, SamplingParams(max_tokens=max_tokens), index=index, group=group)
    scheduler.add(group.members)
    return group.members
