"""The processes of other ranks, with small programs in the place of real ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paged_core import ConfigError, EngineDeadError
from paged_core.ranks import processes
from paged_core.ranks.processes import RankProcesses

ECHO = """
from multiprocessing.connection import Connection
from paged_core.ranks.processes import LastWords
connection = Connection({fd})
{act}
"""
WAITS = "connection.recv(); connection.send(None)\nwhile True: connection.recv()"


@pytest.fixture
def start(monkeypatch):
    """Ranks that do this, after which they end."""
    made = []

    def start(act=WAITS, size=2, **options):
        program = "import sys; sys.path[:] = {path!r}" + ECHO.replace("{act}", act)
        monkeypatch.setattr(processes, "PROGRAM", program)
        made.append(RankProcesses(size, lambda rank: f"job of {rank}", **options))
        return made[-1]

    yield start
    for each in made:
        each.end(patience_s=0.0)


def pids(others):
    return [process.popen.pid for process in others.processes]


def test_each_rank_gets_its_job_and_every_order(start, tmp_path):
    act = "job = connection.recv(); connection.send(None); order = connection.recv()\n"
    others = start(act + f"open({str(tmp_path)!r} + '/' + job, 'w').write(order)", size=3)
    others.wait_until_ready()
    others.send("an order")
    for process in others.processes:
        process.popen.wait(20)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "job of 1": "an order",
        "job of 2": "an order",
    }


def test_a_rank_that_fails_before_it_is_ready_says_why(start):
    with pytest.raises(ConfigError, match="no such folder"):
        start(
            "connection.send(LastWords('ConfigError', 'no such folder')); connection.recv(); input()"
        ).wait_until_ready()


def test_a_rank_that_dies_before_it_is_ready_is_told_of(start):
    with pytest.raises(EngineDeadError, match=r"rank 1 \(process \d+\) has ended with status 7.*build a new one"):
        start("import os; os._exit(7)").wait_until_ready()


def test_a_killed_rank_is_seen_at_once_and_takes_no_orders(start):
    others = start()
    others.wait_until_ready()
    assert others.trouble is None
    os.kill(pids(others)[0], signal.SIGKILL)
    others.processes[0].popen.wait(20)
    assert "was killed by signal 9" in others.trouble
    with pytest.raises(EngineDeadError, match="was killed by signal 9"):
        for _ in range(100):  # the first may lie in the connection yet
            others.send("an order")
    assert "was killed by signal 9" in others.trouble


def test_what_fails_at_work_ends_all_ranks_and_is_told_by_whoever_began(start):
    others = start(
        "connection.recv(); connection.send(None); connection.send(LastWords('RuntimeError', 'no memory'))\ninput()"
    )
    others.wait_until_ready()
    with pytest.raises(EngineDeadError, match=r"rank 1 has failed.*no memory") as told, others.at_work():
        raise RuntimeError("connection closed by peer")
    assert str(told.value.__cause__) == "connection closed by peer"
    assert [process.popen.poll() is not None for process in others.processes] == [True]
    with pytest.raises(EngineDeadError, match="no memory"):
        others.send("an order")


def test_an_interrupt_at_work_stays_an_interrupt_and_no_step_follows(start):
    others = start()
    others.wait_until_ready()
    with pytest.raises(KeyboardInterrupt), others.at_work():
        raise KeyboardInterrupt
    with pytest.raises(EngineDeadError, match="interrupted"):
        others.send("an order")


def test_a_stuck_rank_is_ended_when_its_step_takes_too_long(start):
    others = start(max_step_s=0.1)
    others.wait_until_ready()
    os.kill(pids(others)[0], signal.SIGSTOP)
    with pytest.raises(EngineDeadError, match=r"has not ended in 0.1 s: a rank is stuck"), others.at_work():
        others.processes[0].popen.wait(20)  # what waits for it here hears of its end
        raise RuntimeError("connection closed by peer")


def test_ranks_end_with_what_holds_them(start):
    others = start()
    others.wait_until_ready()
    popen = others.processes[0].popen
    others.end()
    assert popen.poll() is not None
    others.end()


def test_ranks_that_nobody_ends_go_when_nobody_holds_them(monkeypatch):
    monkeypatch.setattr(processes, "PROGRAM", "import sys; sys.path[:] = {path!r}" + ECHO.replace("{act}", WAITS))
    others = RankProcesses(2, lambda rank: rank)
    popen = others.processes[0].popen
    del others
    deadline = time.monotonic() + 20  # the watching thread may hold them for a moment
    while popen.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert popen.poll() is not None


def test_what_a_rank_prints_is_no_output_of_the_program():
    script = (
        f"import os, sys; sys.path[:] = {sys.path!r}\n"
        "from paged_core.ranks import processes\n"
        "processes.PROGRAM = \"print('from a rank'); raise SystemExit(len('{fd}{path}') and 0)\"\n"
        "others = processes.RankProcesses(2, lambda rank: rank)\n"
        "others.processes[0].popen.wait()\n"
        "print('from rank 0')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "from rank 0\n", done.stderr
    assert "from a rank" in done.stderr


LEADER = """
import os, sys; sys.path[:] = {path!r}
from paged_core import EngineConfig
from paged_core.engine.team import EngineArgs, RankArgs
from paged_core.ranks.processes import RankProcesses
asked = EngineArgs("no/model", EngineConfig(tensor_parallel_size=2), None, None)
others = RankProcesses(2, lambda rank: RankArgs(rank, asked, "store", 1, os.getpid()))
print(others.processes[0].popen.pid, flush=True)
input()
"""


def test_no_rank_outlives_a_leader_that_is_killed():
    """Real ones, in the middle of their start."""
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER.format(path=sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with leader:
        rank = int(leader.stdout.readline())
        leader.kill()
    deadline = time.monotonic() + 60
    while alive(rank):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
