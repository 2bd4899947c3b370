"""A forked child has a copy of an AsyncEngine, and not its thread: there it says so at once, and nothing hangs.

Each program runs in a process of its own, forked from one that has imported everything; ``in_child`` runs a function
in a forked child, and checks that it ends well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from places import TESTS

SERVER = """
import asyncio, gc, json, os, sys, threading, time
from alphabet_model import AlphabetModel, Gate
from toy_tokenizers import CharacterTokenizer
from paged_core import AsyncEngine, EngineConfig, EngineDeadError, SamplingParams

WORDS = SamplingParams(temperature=0, max_tokens=5)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
gate = Gate()

def build():
    return AsyncEngine(
        AlphabetModel(gate), tokenizer=CharacterTokenizer(), num_blocks=64, attention_backend="reference"
    )

def text(engine):
    return engine.submit("A", WORDS).result(30).outputs[0].text

def in_child(work):
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    ended_well(child)

def ended_well(child):
    deadline = time.monotonic() + 30
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, status
            return
        if time.monotonic() > deadline:
            os.kill(child, 9)
            raise AssertionError("the child hangs")
        time.sleep(0.01)

def refuses(work):
    try:
        work()
    except EngineDeadError as error:
        assert "the process was forked; build an engine in the child" in str(error), error
    else:
        raise AssertionError("nobody said that the engine isn't there")

build().close()  # imports what engines need
gc.freeze()  # an exit that looks through all of it takes seconds
# One line in: a program; one line out: its process's status.
for line in sys.stdin:
    process = os.fork()
    if not process:
        break
    print(os.waitpid(process, 0)[1], flush=True)
else:
    sys.exit()
engine = build()
exec(json.loads(line))
os._exit(0)
"""

RunProgram = Callable[[str], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunProgram]:
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    log = tmp_path_factory.mktemp("fork") / "stderr"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            ["timeout", "300", sys.executable, "-c", SERVER], env=environment, stderr=errors, **pipes
        ) as server,
    ):
        assert server.stdin and server.stdout

        def run(program: str) -> None:
            print(json.dumps(program), file=server.stdin, flush=True)
            assert server.stdout.readline() == "0\n", log.read_text()

        yield run
        server.stdin.close()


def test_the_childs_copy_says_so_and_a_new_one_serves(run: RunProgram) -> None:
    run("""
gate.open()
assert text(engine) == "BCDEF"

def child():
    assert not engine.alive
    assert engine.busy_s == 0
    refuses(lambda: engine.submit("A", WORDS))
    refuses(lambda: engine.look(lambda engine: 1))
    engine.close(1)
    with build() as own:
        assert text(own) == "BCDEF"

in_child(child)
in_child(lambda: in_child(child))
assert text(engine) == "BCDEF"
engine.close()
""")


def test_streams_of_the_parent_fail_in_the_child_and_go_on_in_the_parent(run: RunProgram) -> None:
    run("""
stream, waiting = engine.submit("A", LONG), engine.submit("B", WORDS)
reader = threading.Thread(target=stream.result, daemon=True)
reader.start()
while not gate.num_steps:
    time.sleep(0.01)
looked = engine.look(lambda engine: "seen")

async def read():
    async for delta in waiting:
        pass

def child():
    refuses(lambda: stream.result(10))
    refuses(lambda: list(stream))
    refuses(lambda: asyncio.run(waiting.aresult()))
    refuses(lambda: asyncio.run(read()))
    refuses(lambda: looked.result(10))
    stream.cancel()
    engine.close()

in_child(child)
gate.open()
assert len(stream.result(30).outputs[0].token_ids) == 200
assert waiting.result(30).outputs[0].text == "CDEFG"
assert looked.result(30) == "seen"
reader.join()
engine.close()
""")


def test_a_stream_that_had_ended_can_be_read_in_the_child(run: RunProgram) -> None:
    run("""
gate.open()
stream = engine.submit("A", WORDS)
stream.result(30)

def child():
    assert "".join(delta.text for delta in stream) == "BCDEF"
    assert stream.result(1).outputs[0].text == "BCDEF"

in_child(child)
engine.close()
""")


def test_a_thread_that_forks_in_a_signal_handler_while_it_waits_hears_of_it(run: RunProgram) -> None:
    run("""
import signal
children = []
signal.signal(signal.SIGALRM, lambda *_: children.append(os.fork()))
stream = engine.submit("A", LONG)
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    stream.result(3)
except EngineDeadError:
    os._exit(0 if children == [0] else 1)
except TimeoutError:
    assert children[0], "the child was not told"
ended_well(children[0])
gate.open()
assert len(stream.result(30).outputs[0].token_ids) == 200
engine.close()
""")


@pytest.mark.parametrize(
    "lock", ["engine._streams.thread._lock.bare()", "engine.codec._encode_lock", "stream._channel._lock"]
)
def test_locks_that_were_held_at_the_fork_stop_nobody(run: RunProgram, lock: str) -> None:
    run(f"""
stream = engine.submit("A", LONG)
held, let_go = threading.Event(), threading.Event()

def hold():
    with {lock}:
        held.set()
        let_go.wait()

def child():
    refuses(lambda: engine.submit("A", WORDS))
    refuses(lambda: engine.look(lambda engine: 1))
    refuses(lambda: stream.result(1))
    assert engine.codec.encode("A") == [33]
    engine.close()

holder = threading.Thread(target=hold)
holder.start()
held.wait()
in_child(child)
let_go.set()
gate.open()
assert len(stream.result(30).outputs[0].token_ids) == 200
engine.close()
""")


def test_a_child_that_exits_as_programs_do_does_not_hang(run: RunProgram) -> None:
    run("""
stream = engine.submit("A", LONG)
child = os.fork()
if not child:
    raise SystemExit(0)  # its exit handlers run
ended_well(child)
gate.open()
assert len(stream.result(30).outputs[0].token_ids) == 200
""")


def test_an_engine_that_had_not_begun_serves_in_parent_and_child(run: RunProgram) -> None:
    run("""
gate.open()

def child():
    assert text(engine) == "BCDEF"
    engine.close()

in_child(child)
assert text(engine) == "BCDEF"
in_child(lambda: refuses(lambda: engine.submit("A", WORDS)))
engine.close()
""")
